//! Tables of C expressions and polldisk's values, which are compared.

use std::fmt::{self, Write};

use anyhow::{Result, ensure};

use crate::compile::SECTION;

/// Room for one example in the compiled data. It is the same for all, so that their offsets are known
/// without asking the compiler.
pub const EXAMPLE_BYTES: usize = 512;

/// Judges the bytes that C made of an example. The error describes how polldisk's differ.
pub type Judge = Box<dyn Fn(&[u8]) -> Result<(), String>>;

/// Everything that is compared in one run of the compiler.
#[derive(Debug)]
pub struct Table {
    /// The table's name in reports.
    pub name: &'static str,
    /// The compiler's options.
    pub flags: &'static [&'static str],
    headers: &'static [&'static str],
    numbers: Vec<Number>,
    examples: Vec<Example>,
}

/// A constant expression of C, and its value in polldisk.
#[derive(Debug)]
struct Number {
    c: String,
    ours: i64,
}

/// A structure of C with known values in it, compared byte by byte.
struct Example {
    c_type: String,
    c_value: String,
    judge: Judge,
}

impl fmt::Debug for Example {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.c_type, self.c_value)
    }
}

impl Table {
    /// An empty table.
    pub fn new(
        name: &'static str,
        flags: &'static [&'static str],
        headers: &'static [&'static str],
    ) -> Table {
        Table { name, flags, headers, numbers: Vec::new(), examples: Vec::new() }
    }

    /// Adds a constant expression and its value in polldisk.
    pub fn number(&mut self, c: impl Into<String>, ours: impl TryInto<i64>) {
        let c = c.into();
        let Ok(ours) = ours.try_into() else { panic!("{c}: over 63 bits") };
        self.numbers.push(Number { c, ours });
    }

    /// Adds a structure with values in it.
    pub fn example(&mut self, c_type: &str, c_value: String, judge: Judge) {
        self.examples.push(Example { c_type: c_type.to_owned(), c_value, judge });
    }

    /// The number of comparisons in the table.
    pub fn checks(&self) -> usize {
        self.numbers.len() + self.examples.len()
    }

    /// The C program whose data [`Table::differences`] reads: all numbers as 64-bit words, then each
    /// example in [`EXAMPLE_BYTES`].
    pub fn source(&self) -> String {
        let mut types = String::new();
        let mut values = String::new();
        for Number { c, .. } in &self.numbers {
            values += &format!("    (int64_t)({c}),\n");
        }
        values += "}";
        for (index, Example { c_type, c_value, .. }) in self.examples.iter().enumerate() {
            // An example that is too large moves the following ones, which `differences` notices.
            _ = writeln!(
                types,
                "    union {{ {c_type} value; char room[{EXAMPLE_BYTES}]; }} example{index};"
            );
            values += &format!(",\n.example{index}.value = {c_value}");
        }
        let headers: String =
            self.headers.iter().map(|name| format!("#include <{name}>\n")).collect();
        let count = self.numbers.len();
        format!(
            "{headers}\nstatic const struct {{\n    int64_t numbers[{count}];\n{types}}} abi\n\
             __attribute__((section(\"{SECTION}\"), used)) = {{\n.numbers = {{\n{values}\n}};\n"
        )
    }

    /// The differences between the compiled data and polldisk.
    pub fn differences(&self, data: &[u8]) -> Result<Vec<String>> {
        let wanted = 8 * self.numbers.len() + EXAMPLE_BYTES * self.examples.len();
        ensure!(data.len() == wanted, "{}: {} bytes, not {wanted}", self.name, data.len());
        let (numbers, examples) = data.split_at(8 * self.numbers.len());
        let numbers = self.numbers.iter().zip(numbers.as_chunks().0);
        let examples = self.examples.iter().zip(examples.chunks_exact(EXAMPLE_BYTES));
        Ok(numbers
            .filter_map(|(number, bytes)| number.difference(i64::from_le_bytes(*bytes)))
            .chain(examples.filter_map(|(example, bytes)| example.difference(bytes)))
            .map(|difference| format!("{}: {difference}", self.name))
            .collect())
    }
}

impl Number {
    fn difference(&self, theirs: i64) -> Option<String> {
        let Number { c, ours } = self;
        (*ours != theirs).then(|| format!("{c} is {theirs}, polldisk has {ours}"))
    }
}

impl Example {
    fn difference(&self, bytes: &[u8]) -> Option<String> {
        let Example { c_type, c_value, judge } = self;
        judge(bytes).err().map(|error| format!("{c_type}: {error} in {c_value}"))
    }
}

/// Names the first byte in which two encodings differ. The shorter one is padded with zeroes.
pub fn same_bytes(ours: &[u8], theirs: &[u8]) -> Result<(), String> {
    let byte = |bytes: &[u8], at: usize| bytes.get(at).copied().unwrap_or(0);
    for at in 0..ours.len().max(theirs.len()) {
        let (ours, theirs) = (byte(ours, at), byte(theirs, at));
        if ours != theirs {
            return Err(format!("byte {at} is {theirs:#04x}, polldisk writes {ours:#04x}"));
        }
    }
    Ok(())
}

/// The width of the field that a function returns.
pub fn width<T, F>(_field: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

/// Compares a structure's size and its fields' offsets and widths.
#[macro_export]
macro_rules! structure {
    ($table:expr, $c:literal is $ours:ty { $($c_field:literal is $field:ident),* }) => {
        $table.number(concat!("sizeof(", $c, ")"), size_of::<$ours>());
        $(
            $table.number(
                concat!("offsetof(", $c, ", ", $c_field, ")"),
                std::mem::offset_of!($ours, $field),
            );
            $table.number(
                concat!("sizeof(((", $c, " *)0)->", $c_field, ")"),
                $crate::table::width(|value: &$ours| &value.$field),
            );
        )*
    };
}
