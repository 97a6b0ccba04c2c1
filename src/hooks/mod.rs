//! Hooks: what makes a guest quiet around the instant, and lets it go again.
//!
//! * [`freeze`]: the lease of a freeze, through the guest's agent.
//! * [`hold`], [`guest_hold`]: databases kept quiet, by programs of the host or of the guest; [`profile`]: those we know.
//! * [`program`]: the operator's own programs around a phase.
//! * [`config`]: how holds and hooks are written down.
//!
//! Everything here is bounded in time, and what was begun is ended whatever else fails. What outlives us (a frozen guest)
//! is written down by who calls, before the step.

pub mod config;
pub mod freeze;
pub mod guest_hold;
pub mod hold;
pub mod profile;
pub mod program;
