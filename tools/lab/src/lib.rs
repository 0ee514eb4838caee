//! Real Xen in an emulator: builds it, boots it, and runs polldisk under it.
