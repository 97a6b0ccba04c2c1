//! Nearly all tests, as one program: it is linked once, and those that wait let others run. A test that looks at its own process
//! (its memory, descriptors, panics) is a program of its own beside this directory.
//!
//! One file of them: `cargo test --test suite scan::`.

#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../map_common/mod.rs"]
mod map_common;
#[path = "../nbd_help/mod.rs"]
mod nbd_help;
#[path = "../repo_common/mod.rs"]
mod repo_common;
#[path = "../restore_common/mod.rs"]
mod restore_common;
#[path = "../session_fixture/mod.rs"]
mod session_fixture;
#[path = "../tls_common/mod.rs"]
mod tls_common;
#[path = "../torture_log/mod.rs"]
mod torture_log;
#[path = "../vhost_fixture/mod.rs"]
mod vhost_fixture;
#[path = "../wire_begun/mod.rs"]
mod wire_begun;

mod areas;
mod arrived;
mod audit;
mod boot_files;
mod checkpoint_bitmap;
mod checkpoint_epoch;
mod checkpoint_format;
mod checkpoint_log;
mod checkpoint_merge;
mod cli_commands;
mod databases;
mod devices;
mod doctor_guest;
mod exclusive_device;
mod fooled;
mod freeze;
mod graph;
mod graph_board;
mod guest;
mod guest_power_off;
mod guest_swap;
mod guest_writes;
mod harness;
mod holds;
mod host_status;
mod impact;
mod instant;
mod kill;
mod known;
mod layers;
mod lives;
mod map;
mod map_trouble;
mod mid_read;
mod midst;
mod monitor_commands;
mod monitor_connect;
mod monitor_descriptors;
mod monitor_probe;
mod mount_points;
mod moved;
mod nbd_qemu;
mod nbd_servers;
mod nbd_session;
mod on_demand;
mod overhead;
mod overhead_lvm;
mod pace;
mod partition;
mod persistent;
mod power_off;
mod queue;
mod repo_crash;
mod repo_damage;
mod repo_write_read;
mod restore;
mod restore_failures;
mod resume;
mod resume_killed;
mod resume_token;
mod run;
mod scan;
mod schemas;
mod server_memory;
mod session;
mod session_end;
mod stops;
mod tls;
mod torture;
mod trimmed;
mod trunk;
mod vhost_blk;
mod vhost_peers;
mod wire_frame;
mod wire_hello;
mod wire_packed;
mod wire_recorded;
mod wire_scan;
mod wire_session;
mod wire_trunk;
