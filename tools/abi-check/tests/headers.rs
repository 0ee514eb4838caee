//! Compares polldisk with the installed headers, and checks the comparison itself.

use abi_check::table::{EXAMPLE_BYTES, Table, same_bytes};

/// The headers are in Debian's package `libxen-dev`. If it is not installed, the test says so and passes,
/// unless `POLLDISK_REQUIRE_XEN_TOOLS=1`, which CI sets.
#[test]
fn polldisk_agrees_with_xens_headers() {
    if let Some(what) = abi_check::missing() {
        let required = std::env::var("POLLDISK_REQUIRE_XEN_TOOLS").is_ok_and(|value| value == "1");
        assert!(!required, "abi-check needs {what}");
        eprintln!("SKIPPED: abi-check needs {what}");
        return;
    }
    let report = abi_check::compare().unwrap();
    eprintln!("{report}");
    // Far fewer would mean that whole parts are no longer compared.
    assert!(report.checks > 200, "{report}");
    assert!(report.differences.is_empty(), "{report}");
}

/// Needs no compiler: the data is what a compiler would make of two numbers and an example.
#[test]
fn a_difference_is_reported_and_nothing_else() {
    let mut table = Table::new("test", &[], &[]);
    table.number("RIGHT", 7);
    table.number("WRONG", -8);
    table.example("char", "9".into(), Box::new(|theirs| same_bytes(&[8], theirs)));
    let mut data: Vec<u8> = [7i64, 8].iter().flat_map(|number| number.to_le_bytes()).collect();
    data.resize(data.len() + EXAMPLE_BYTES, 0);
    data[16] = 9;
    let expected = [
        "test: WRONG is 8, polldisk has -8",
        "test: char: byte 0 is 0x09, polldisk writes 0x08 in 9",
    ];
    assert_eq!(table.differences(&data).unwrap(), expected);
    assert!(table.differences(&data[8..]).is_err());
}
