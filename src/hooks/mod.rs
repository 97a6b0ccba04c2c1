//! Hooks: what makes a guest quiet around the instant, and lets it go again.
//!
//! * [`freeze`]: the lease of a freeze, through the guest's agent.
//!
//! Everything here is bounded in time, and what was begun is ended whatever else fails. What outlives us (a frozen guest)
//! is written down by who calls, before the step.

pub mod freeze;
