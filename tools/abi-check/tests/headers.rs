//! polldisk against the headers that are installed here.

/// Debian has them in the package `libxen-dev`. Where it is not installed the test says so and
/// passes, unless `POLLDISK_REQUIRE_XEN_TOOLS=1`, as CI sets it.
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
