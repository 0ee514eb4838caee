//! Style rules that would decay if no test enforced them: who may import whom, where unsafe code
//! may be, how long a file may grow.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Which parts of the library each part may import from. `xen` stands for the boundary without
/// `xen::linux`, which like `sim` only `main.rs`, tests, benches and tools may name.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("units", &[]),
    ("limits", &[]),
    ("text", &[]),
    ("patience", &[]),
    ("park", &["patience"]),
    ("metrics", &[]),
    ("pool", &[]),
    ("budget", &["limits"]),
    ("output", &["limits", "text"]),
    ("backing", &["limits", "text", "units"]),
    ("xen", &["limits", "park", "units"]),
    ("blkif", &["backing", "limits", "units", "xen"]),
    ("config", &["backing", "blkif", "limits", "patience", "text"]),
    ("msg", &["backing", "blkif", "budget", "limits", "metrics", "park", "units"]),
    ("engine", &["backing", "limits", "park", "pool", "xen"]),
    (
        "queue",
        &[
            "backing", "blkif", "budget", "engine", "limits", "metrics", "msg", "pool", "units",
            "xen",
        ],
    ),
    (
        "worker",
        &[
            "backing", "engine", "limits", "metrics", "msg", "park", "patience", "queue", "units",
            "xen",
        ],
    ),
    (
        "control",
        &["backing", "blkif", "budget", "limits", "metrics", "msg", "park", "text", "units", "xen"],
    ),
    (
        "sim",
        &[
            "backing", "blkif", "control", "engine", "limits", "msg", "park", "units", "worker",
            "xen",
        ],
    ),
];

/// Files that may hold unsafe code: for guest memory, the kernel's devices,
/// io_uring, the stand-in's memory, waiting, and the C library's functions.
const MAY_BE_UNSAFE: &[&str] = &[
    "src/backing/device.rs",
    "src/backing/locks.rs",
    "src/backing/mapped.rs",
    "src/engine/guarded.rs",
    "src/engine/memory.rs",
    "src/engine/uring.rs",
    "src/park.rs",
    "src/sim/",
    "src/xen/linux/",
    "src/xen/shm.rs",
    "src/xen/store/readiness.rs",
    "tools/loadgen/src/sys.rs",
    "tools/preload/src/",
];

const LINES_MAX: usize = 700;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(folder: &str) -> Vec<PathBuf> {
    let mut folders = vec![root().join(folder)];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    assert!(!files.is_empty());
    files
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned()
}

/// A file's text without comments and without its test module, which comes last.
fn code_of(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap();
    let code = text.split("#[cfg(test)]\nmod test").next().unwrap_or("");
    code.lines().map(|line| line.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n")
}

fn is_test(path: &Path) -> bool {
    path.file_stem().is_some_and(|stem| stem.to_str().unwrap().ends_with("test"))
        || path.components().any(|part| part.as_os_str() == "test")
}

/// Parts of the library that a text names after `crate::`; `xen::linux` counts as its own part.
fn imports(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        let listed = rest.strip_prefix('{').map(|list| list.split('}').next().unwrap_or(""));
        for path in listed.unwrap_or(rest).split(',') {
            let name: String = path
                .trim()
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_' || *c == ':')
                .collect();
            let mut parts = name.split("::");
            match (parts.next(), parts.next()) {
                (Some("xen"), Some("linux")) => found.insert("xen::linux".to_owned()),
                (Some(part), _) if !part.is_empty() => found.insert(part.to_owned()),
                _ => false,
            };
            if listed.is_none() {
                break;
            }
        }
    }
    found
}

#[test]
fn imports_flow_in_one_direction() {
    let mut wrong = Vec::new();
    for path in rust_files("src") {
        let name = relative(&path);
        let part = name.trim_start_matches("src/").split(['/', '.']).next().unwrap().to_owned();
        if matches!(part.as_str(), "lib" | "main" | "cli") || is_test(&path) {
            continue;
        }
        let (_, allowed) = MAY_IMPORT
            .iter()
            .find(|(known, _)| *known == part)
            .unwrap_or_else(|| panic!("{name}: a new part of the library belongs in MAY_IMPORT"));
        for import in imports(&code_of(&path)) {
            let inside_linux = import == "xen::linux" && name.starts_with("src/xen/linux/");
            if import != part && !allowed.contains(&import.as_str()) && !inside_linux {
                wrong.push(format!("{name} may not import crate::{import}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_import_scanner_sees_all_forms() {
    let code =
        "use crate::units::{A, B};\nlet x = crate::xen::linux::open();\nuse crate::{msg, sim::x};";
    let found: Vec<String> = imports(code).into_iter().collect();
    assert_eq!(found, ["msg", "sim", "units", "xen::linux"]);
}

/// Modules of a folder, each with the modules that it imports.
fn module_imports(folder: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut modules: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for path in rust_files(folder).iter().filter(|path| !is_test(path)) {
        let name = relative(path);
        let part = name[folder.len() + 1..].split(['/', '.']).next().unwrap().to_owned();
        let imported = imports(&code_of(path)).into_iter().filter(|import| *import != part);
        modules.entry(part.clone()).or_default().extend(imported);
    }
    modules
}

/// The modules in import circles and those that import them; empty if there is no circle.
fn circle(mut modules: BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
    loop {
        let names: BTreeSet<String> = modules.keys().cloned().collect();
        modules.retain(|_, imports| !imports.is_disjoint(&names));
        if modules.len() == names.len() {
            return names.into_iter().collect();
        }
    }
}

#[test]
fn no_tool_has_an_import_circle() {
    for tool in ["compare", "lab", "loadgen", "xtask"] {
        let found = circle(module_imports(&format!("tools/{tool}/src")));
        assert!(found.is_empty(), "tools/{tool}: an import circle among {}", found.join(", "));
    }
}

#[test]
fn the_circle_finder_follows_long_ways() {
    let modules = |arrows: &[(&str, &str)]| {
        let mut modules: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (from, to) in arrows {
            modules.entry((*from).to_owned()).or_default().insert((*to).to_owned());
        }
        modules
    };
    let line = [("a", "b"), ("a", "c"), ("b", "c")];
    assert!(circle(modules(&line)).is_empty());
    let round = [("a", "b"), ("b", "c"), ("c", "a"), ("b", "d")];
    assert_eq!(circle(modules(&round)), ["a", "b", "c"]);
}

/// The table in the library's documentation equals [`MAY_IMPORT`].
#[test]
fn the_documentation_names_the_same_imports() {
    let text = std::fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let table = text.split("# Who may import whom").nth(1).unwrap();
    let table = table.split("```").nth(1).unwrap().trim_start_matches("text");
    let told: Vec<Vec<&str>> = table
        .lines()
        .map(|line| line.trim_start_matches("//!").split_whitespace().collect())
        .filter(|words: &Vec<&str>| !words.is_empty())
        .collect();
    let held: Vec<Vec<&str>> =
        MAY_IMPORT.iter().map(|(part, imports)| [&[*part], *imports].concat()).collect();
    assert_eq!(told, held);
}

/// A simulation steps control and workers in one thread, and a seed must always give the same run.
#[test]
fn time_and_order_are_inputs() {
    const STEPPED: &[&str] = &["src/control/", "src/engine/", "src/queue/", "src/worker/"];
    // The code that sleeps and reads the clock for them, and the command line's end of the admin socket.
    const SHELLS: &[&str] =
        &["src/control/run.rs", "src/control/admin/client.rs", "src/control/admin/place.rs"];
    const FORBIDDEN: &[&str] = &[
        "Instant::now(",
        "SystemTime::now(",
        "thread::sleep(",
        // Their order differs from run to run.
        "HashMap::new(",
        "HashSet::new(",
        "RandomState",
    ];
    for path in rust_files("src") {
        let name = relative(&path);
        let stepped = STEPPED.iter().any(|folder| name.starts_with(folder));
        if !stepped || is_test(&path) || SHELLS.contains(&name.as_str()) {
            continue;
        }
        let code = code_of(&path);
        for word in FORBIDDEN {
            assert!(!code.contains(word), "{name} uses {word}");
        }
    }
}

#[test]
fn unsafe_code_stands_only_where_it_is_named() {
    for path in rust_files("src").into_iter().chain(rust_files("tools")) {
        let name = relative(&path);
        let named = MAY_BE_UNSAFE.iter().any(|allowed| name.starts_with(allowed));
        let code = code_of(&path);
        let unsafe_code = code.contains("unsafe {") || code.contains("unsafe fn");
        assert!(named || is_test(&path) || !unsafe_code, "{name} holds unsafe code");
    }
}

/// `println!` and its relatives panic if standard output or standard error cannot be written to;
/// `polldisk::output` does not.
#[test]
fn nothing_is_printed_in_a_way_that_can_panic() {
    for path in rust_files("src").into_iter().chain(rust_files("tools")) {
        let name = relative(&path);
        let may_print = is_test(&path) || name.split('/').any(|part| part == "tests");
        let prints = ["print!(", "println!("].iter().any(|print| code_of(&path).contains(print));
        assert!(may_print || !prints, "{name} prints by a macro: use polldisk::output");
    }
}

#[test]
fn the_readme_names_the_oldest_linux() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let named = format!("Linux {} or later", polldisk::limits::LINUX_MIN);
    assert!(readme.contains(&named), "README.md does not say \"{named}\"");
}

/// Phrases that a native reader stumbles over, in comments and messages.
#[test]
fn no_text_reads_as_if_it_were_translated() {
    const PHRASES: &[&str] = &[
        "of no use",
        "to be had",
        "in vain",
        "so much of",
        "of so many",
        "`None` where",
        "none where",
        "tells of",
        "tell of",
        "more seldom",
        "by then",
        "akes note",
        "such a one",
        "hoever",
        "one after the other",
        "inside of",
    ];
    for folder in ["src", "tests", "tools", "benches"] {
        for path in rust_files(folder) {
            let name = relative(&path);
            let text = std::fs::read_to_string(&path).unwrap();
            for (number, line) in (1..).zip(text.lines()) {
                let phrase = PHRASES.iter().find(|phrase| line.contains(*phrase));
                let is_list = name == "tests/tidy.rs";
                assert!(is_list || phrase.is_none(), "{name}:{number}: {phrase:?}");
            }
        }
    }
}

#[test]
fn no_file_outgrows_its_purpose() {
    for path in rust_files("src").into_iter().chain(rust_files("tools")) {
        if is_test(&path) || path.components().any(|part| part.as_os_str() == "target") {
            continue;
        }
        let lines = code_of(&path).lines().filter(|line| !line.trim().is_empty()).count();
        assert!(lines <= LINES_MAX, "{} has {lines} lines of code", relative(&path));
    }
}
