//! Config: what a repository is, in the file `config` ([sealed](crate::repo::sealed) JSON).

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::limits::{MAX_CHUNK_BYTES, MIN_CHUNK_BYTES};
use crate::repo::error::FormatError;
use crate::repo::sealed::{self, Kind};
use crate::units::RepositoryId;

const KIND: Kind = Kind { format: "livebackup-repository", version: 1 };

/// What a repository is. Written once, by `init`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Its id.
    pub id: RepositoryId,
    /// Chunk size of disks that come without one: a power of two in `MIN_CHUNK_BYTES..=MAX_CHUNK_BYTES`.
    pub chunk_bytes: u32,
    /// When it was made.
    pub created: Timestamp,
}

/// Whether this is a chunk size that a repository takes.
pub fn is_chunk_size(chunk_bytes: u32) -> bool {
    chunk_bytes.is_power_of_two() && (MIN_CHUNK_BYTES..=MAX_CHUNK_BYTES).contains(&chunk_bytes)
}

impl Config {
    /// The file.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        sealed::encode(KIND, self)
    }

    /// The config in a file.
    pub fn decode(file: &[u8]) -> Result<Self, FormatError> {
        let config: Self = sealed::decode(KIND, file)?;
        if !is_chunk_size(config.chunk_bytes) {
            return Err(FormatError::bad(format!("its chunk size is {} bytes", config.chunk_bytes)));
        }
        Ok(config)
    }
}
