//! polldisk
fn main() {}
