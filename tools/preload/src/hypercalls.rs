//! The hypercall page that the crate xen-sys refers to.
//!
//! Its hypercall functions are for kernels. A program drops them, but a shared library keeps every
//! `extern "C"` function, so it would not load without the page.
#![allow(unsafe_code)]

/// 128 entries of 32 bytes, which are never called.
#[unsafe(no_mangle)]
static HYPERCALL_PAGE: [u8; 4096] = [0; 4096];
