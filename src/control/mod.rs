//! The control plane.

pub mod machine;
