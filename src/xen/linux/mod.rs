//! Real Xen: `/dev/xen/gntdev` and `/dev/xen/evtchn`, and xenstored.
