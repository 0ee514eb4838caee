//! The hypercall page that the crate xen-sys refers to.
//!
//! Its hypercall functions are for kernels; a program drops them, but a shared library keeps every
//! function of C's kind, and would not load without the page.
#![allow(unsafe_code)]

/// 128 entries of 32 bytes, which nobody calls.
#[unsafe(no_mangle)]
static HYPERCALL_PAGE: [u8; 4096] = [0; 4096];
