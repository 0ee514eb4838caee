//! Foreign text, such as a guest's nodes or the names of files, made safe to print on one line.

use std::borrow::Cow;
use std::fmt::Write;

/// The text on one line, with nothing that moves a terminal's cursor, starts another line or hides
/// what follows: such characters become escapes, `\n` for a line break.
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(is_unprintable) {
        return Cow::Borrowed(text);
    }
    let mut printed = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match is_unprintable(c) {
            true => printed.extend(c.escape_default()),
            false => printed.push(c),
        }
    }
    Cow::Owned(printed)
}

/// Control characters; line and paragraph separators; marks that change the direction of writing.
fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// An error and all of its causes.
pub fn causes<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error), |error| error.source())
}

/// An error and all of its causes, on one line.
pub fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let told = causes(error).map(|cause| printable(&cause.to_string()).into_owned());
    told.collect::<Vec<_>>().join(": ")
}

/// The beginning of an untrusted text, at most 32 characters, as ASCII.
pub fn excerpt(text: &str) -> String {
    const SHOWN: usize = 32;
    let mut excerpt: String = text.chars().take(SHOWN).flat_map(char::escape_default).collect();
    if text.chars().nth(SHOWN).is_some() {
        excerpt.push_str("...");
    }
    excerpt
}

/// Numbers as a person lists them: `0-3,8`.
pub fn ranges(numbers: &[usize]) -> String {
    let mut text = String::new();
    let mut rest = numbers;
    while let [first, ..] = rest {
        let len = rest.iter().zip(*first..).take_while(|(number, next)| *number == next).count();
        let separator = if text.is_empty() { "" } else { "," };
        let last = first + (len - 1);
        // Writing to a String never fails.
        let _ = match len {
            1 => write!(text, "{separator}{first}"),
            2 => write!(text, "{separator}{first},{last}"),
            _ => write!(text, "{separator}{first}-{last}"),
        };
        rest = rest.get(len..).unwrap_or_default();
    }
    text
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_moves_the_cursor_is_escaped_and_all_else_stays() {
        for (text, printed) in [
            ("raw:/srv/guest 1.img", "raw:/srv/guest 1.img"),
            ("/srv/grün/日本/e\u{301}", "/srv/grün/日本/e\u{301}"),
            ("C:\\x\"'", "C:\\x\"'"),
            ("a\nb\tc\r", "a\\nb\\tc\\r"),
            ("\u{1b}[2J\u{9b}2J\u{7f}\0", "\\u{1b}[2J\\u{9b}2J\\u{7f}\\u{0}"),
            ("gmi.\u{202e}x", "gmi.\\u{202e}x"),
        ] {
            assert_eq!(printable(text), printed);
        }
    }

    #[test]
    fn an_excerpt_is_short_and_says_that_it_is_one() {
        assert_eq!(excerpt("8\n"), "8\\n");
        assert_eq!(excerpt(&"a".repeat(32)), "a".repeat(32));
        assert_eq!(excerpt(&"a".repeat(33)), "a".repeat(32) + "...");
    }

    #[test]
    fn neighbours_become_a_range() {
        for (numbers, text) in [
            (&[][..], ""),
            (&[7], "7"),
            (&[0, 1], "0,1"),
            (&[0, 1, 2, 3, 8], "0-3,8"),
            (&[3, 2, 4, 5, 6], "3,2,4-6"),
        ] {
            assert_eq!(ranges(numbers), text);
        }
    }

    proptest! {
        #[test]
        fn no_text_leaves_its_line(text in "\\PC{0,8}[\\x00-\\x1f\u{80}-\u{9f}]{0,8}") {
            prop_assert!(!printable(&text).contains(char::is_control));
            prop_assert!(excerpt(&text).bytes().all(|byte| (b' '..=b'~').contains(&byte)));
        }
    }
}
