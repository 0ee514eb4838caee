//! polldisk
