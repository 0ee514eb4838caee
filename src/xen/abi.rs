//! Structures shared with Xen, the kernel's Xen devices and xenstored, byte for byte.
