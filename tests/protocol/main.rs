//! Every combination of rings, queues, indirect requests, grants, layouts and sector sizes: random
//! requests on random connections, each answer and every byte checked.
//!
//! A run prints the seed of each connection before it begins; a failed test shows these seeds, and
//! `POLLDISK_PROTOCOL_SEED=<seed>` plays only that connection. `POLLDISK_PROTOCOL_CASES=<number>`
//! makes a run longer.

mod alignment;
mod alone;
mod budget;
mod chaos;
mod daemon;
mod draw;
mod exhaustion;
mod failures;
mod fairness;
mod frozen;
mod guest;
#[path = "../host/mod.rs"]
mod host;
mod leaving;
mod media;
mod negotiated;
mod neighbours;
mod queues;
mod random;
mod refusals;
mod reports;
mod scripted;
mod wake_ups;
mod workers;
