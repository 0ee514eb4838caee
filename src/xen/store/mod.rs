//! The xenstore client: one implementation for xenstored and for the stand-in.
