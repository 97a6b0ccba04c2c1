//! The `livebackup` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    livebackup::cli::main()
}
