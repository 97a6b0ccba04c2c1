//! Exit codes: what a script can tell apart. Mapped here and nowhere else.

use std::io;
use std::process::ExitCode;

use crate::backup::BackupError;
use crate::map::MapError;
use crate::overhead::guest::error::GuestError;
use crate::pki::PkiError;
use crate::repo::RepoError;
use crate::repo::point::ChoiceError;
use crate::restore::RestoreError;
use crate::wire::message::{Failure, FailureCode};

/// How the program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    Good,
    Failed,
    Usage,
    NotFound,
    Busy,
    NotIncremental,
    Damaged,
    NoSpace,
    Denied,
    Interrupted,
    /// As the program that was run ended.
    Passed(u8),
}

impl Code {
    /// All of our own, as `--help` lists them.
    pub const ALL: [Self; 10] = [
        Self::Good,
        Self::Failed,
        Self::Usage,
        Self::NotFound,
        Self::Busy,
        Self::NotIncremental,
        Self::Damaged,
        Self::NoSpace,
        Self::Denied,
        Self::Interrupted,
    ];

    /// The number.
    pub fn number(self) -> u8 {
        match self {
            Self::Good => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Busy => 4,
            Self::NotIncremental => 5,
            Self::Damaged => 6,
            Self::NoSpace => 7,
            Self::Denied => 8,
            Self::Interrupted => 130,
            Self::Passed(number) => number,
        }
    }

    /// Its name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Good => "ok",
            Self::Failed => "failed",
            Self::Usage => "usage",
            Self::NotFound => "not-found",
            Self::Busy => "busy",
            Self::NotIncremental => "not-incremental",
            Self::Damaged => "damaged",
            Self::NoSpace => "no-space",
            Self::Denied => "denied",
            Self::Interrupted => "interrupted",
            Self::Passed(_) => "passed",
        }
    }

    /// What it means.
    pub fn words(self) -> &'static str {
        match self {
            Self::Good => "all went well",
            Self::Failed => "it failed",
            Self::Usage => "the arguments are wrong",
            Self::NotFound => "no such VM, disk, restore point or repository",
            Self::Busy => "another backup, server or process has it, or the guest needs its disk: try again later",
            Self::NotIncremental => "an incremental was demanded and is not possible",
            Self::Damaged => "the repository is damaged",
            Self::NoSpace => "no space left",
            Self::Denied => "a certificate was refused, or does not grant this",
            Self::Interrupted => "interrupted",
            Self::Passed(_) => "the program that was run ended so",
        }
    }
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        code.number().into()
    }
}

/// Something that the command line itself found wrong.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Problem {
    code: Code,
    message: String,
}

fn problem(code: Code, message: impl Into<String>) -> anyhow::Error {
    Problem { code, message: message.into() }.into()
}

/// The arguments are wrong.
pub fn usage(message: impl Into<String>) -> anyhow::Error {
    problem(Code::Usage, message)
}

/// What was named is not there.
pub fn not_found(message: impl Into<String>) -> anyhow::Error {
    problem(Code::NotFound, message)
}

/// The user stopped it.
pub fn interrupted(message: impl Into<String>) -> anyhow::Error {
    problem(Code::Interrupted, message)
}

/// The code for an error: that of the first cause that has one.
pub fn code(error: &anyhow::Error) -> Code {
    error.chain().find_map(of_cause).unwrap_or(Code::Failed)
}

fn of_cause(cause: &(dyn std::error::Error + 'static)) -> Option<Code> {
    if let Some(problem) = cause.downcast_ref::<Problem>() {
        return Some(problem.code);
    }
    if let Some(error) = cause.downcast_ref::<BackupError>() {
        return of_backup(error);
    }
    if let Some(error) = cause.downcast_ref::<RepoError>() {
        return of_repository(error);
    }
    if let Some(error) = cause.downcast_ref::<RestoreError>() {
        return of_restore(error);
    }
    if let Some(error) = cause.downcast_ref::<MapError>() {
        return of_map(error);
    }
    if let Some(error) = cause.downcast_ref::<PkiError>() {
        return of_pki(error);
    }
    if let Some(error) = cause.downcast_ref::<GuestError>() {
        return of_guest(error);
    }
    if let Some(failure) = cause.downcast_ref::<Failure>() {
        return of_failure(failure.code);
    }
    let error = cause.downcast_ref::<io::Error>()?;
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded).then_some(Code::NoSpace)
}

fn of_backup(error: &BackupError) -> Option<Code> {
    match error {
        BackupError::Repository(error) => of_repository(error),
        BackupError::Sidecar(failure) => of_failure(failure.code),
        BackupError::BaseLost { .. } => Some(Code::Damaged),
        BackupError::NotPossible { .. } => Some(Code::NotIncremental),
        BackupError::Interrupted => Some(Code::Interrupted),
        BackupError::Unfinished | BackupError::Contradiction(_) | BackupError::Panicked => None,
    }
}

fn of_repository(error: &RepoError) -> Option<Code> {
    if error.is_no_space() {
        return Some(Code::NoSpace);
    }
    match error {
        RepoError::NotARepository { .. } | RepoError::NoPoint { .. } => Some(Code::NotFound),
        RepoError::VmBusy { .. } | RepoError::Busy { .. } => Some(Code::Busy),
        RepoError::Corrupt { .. }
        | RepoError::BadConfig { .. }
        | RepoError::DamagedBlob { .. }
        | RepoError::Missing { .. }
        | RepoError::LatestUnknown { .. } => Some(Code::Damaged),
        // A pack that an index lists is gone.
        RepoError::Io { what: "open the pack", source, .. } if source.kind() == io::ErrorKind::NotFound => {
            Some(Code::Damaged)
        }
        RepoError::Failed(error) => of_repository(error),
        _ => None,
    }
}

fn of_choice(error: &ChoiceError) -> Option<Code> {
    match error {
        ChoiceError::Unknown { .. } => Some(Code::NotFound),
        ChoiceError::Twice { .. } => Some(Code::Usage),
    }
}

fn of_restore(error: &RestoreError) -> Option<Code> {
    if error.is_interrupted() {
        return Some(Code::Interrupted);
    }
    if error.is_no_space() {
        return Some(Code::NoSpace);
    }
    match error {
        RestoreError::Choice(error) => of_choice(error),
        RestoreError::SameTarget { .. } => Some(Code::Usage),
        RestoreError::InUse { .. } => Some(Code::Busy),
        RestoreError::Unreadable { source, .. } | RestoreError::Repo(source) => of_repository(source),
        RestoreError::DeviceUndefined { source, .. } => of_restore(source),
        _ => None,
    }
}

fn of_map(error: &MapError) -> Option<Code> {
    match error {
        MapError::Choice(error) => of_choice(error),
        MapError::NoDisks { .. } => Some(Code::NotFound),
        MapError::NotLoopback { .. } | MapError::PathTooLong { .. } => Some(Code::Usage),
        MapError::SocketInUse { .. } => Some(Code::Busy),
        MapError::Tcp { source, .. } => match source.kind() {
            io::ErrorKind::InvalidInput => Some(Code::Usage),
            io::ErrorKind::AddrInUse => Some(Code::Busy),
            _ => None,
        },
        MapError::Repo(source) => of_repository(source),
        _ => None,
    }
}

fn of_pki(error: &PkiError) -> Option<Code> {
    match error {
        PkiError::NoAuthority { .. } | PkiError::Unknown { .. } => Some(Code::NotFound),
        PkiError::Name { .. } => Some(Code::Usage),
        PkiError::Durable(error) => error.is_no_space().then_some(Code::NoSpace),
        _ => None,
    }
}

fn of_guest(error: &GuestError) -> Option<Code> {
    match error {
        GuestError::Served { .. } => Some(Code::Busy),
        GuestError::Machine(failure) | GuestError::Session(failure) => of_failure(failure.code),
        GuestError::NoSpace { .. } => Some(Code::NoSpace),
        GuestError::Interrupted => Some(Code::Interrupted),
        // What was left counts.
        GuestError::Left { .. } => Some(Code::Failed),
        _ => None,
    }
}

fn of_failure(code: FailureCode) -> Option<Code> {
    match code {
        FailureCode::UnknownVm | FailureCode::UnknownDisk => Some(Code::NotFound),
        FailureCode::Busy | FailureCode::GaveWay => Some(Code::Busy),
        FailureCode::NotIncremental => Some(Code::NotIncremental),
        FailureCode::NoSpace => Some(Code::NoSpace),
        FailureCode::Denied => Some(Code::Denied),
        FailureCode::Interrupted => Some(Code::Interrupted),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn a_cause_keeps_its_code_under_any_words() {
        let busy: anyhow::Error = Failure::new(FailureCode::Busy, "another has it").into();
        assert_eq!(code(&busy.context("cannot back up")), Code::Busy);
        let full = io::Error::from(io::ErrorKind::StorageFull);
        assert_eq!(code(&Err::<(), _>(full).context("cannot write").unwrap_err()), Code::NoSpace);
        let none = BackupError::Repository(RepoError::NoPoint {
            vm: "a".to_owned(),
            point: "latest".to_owned(),
            reason: "none".to_owned(),
        });
        assert_eq!(code(&none.into()), Code::NotFound);
        assert_eq!(code(&BackupError::Interrupted.into()), Code::Interrupted);
        assert_eq!(code(&anyhow::anyhow!("whatever")), Code::Failed);
        assert_eq!(code(&usage("no")), Code::Usage);
    }

    #[test]
    fn no_two_codes_share_a_number_or_name() {
        for (i, a) in Code::ALL.iter().enumerate() {
            for b in &Code::ALL[..i] {
                assert!(a.number() != b.number() && a.name() != b.name());
            }
        }
    }
}
