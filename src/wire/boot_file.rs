//! Boot files: kernel, initrd and firmware of a machine, which a client keeps with its points. It asks for one piece after the other
//! on a connection of its own, while the session's data come over others: such files are small, and one that changes does so
//! when nobody needs speed.
//!
//! A client that has the file of an earlier point says so by the digests of its chunks; a piece whose chunks all agree is not
//! sent again.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::digests::ChunkDigest;
use crate::limits::MAX_READ_BYTES;
use crate::units::GIB;

/// Longest file that is given.
pub const MAX_BOOT_FILE_BYTES: u64 = GIB;
/// Longest piece.
pub const MAX_PIECE_BYTES: u64 = MAX_READ_BYTES;

/// A piece that is asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Wanted {
    /// Which VM.
    pub vm: String,
    /// One of [`Machine::boot_files`](crate::machine::Machine::boot_files).
    pub name: String,
    /// Where it begins: a multiple of [`MAX_PIECE_BYTES`]. It is as long as that, or ends with the file.
    pub offset_bytes: u64,
    /// Chunk size of the client's repository, as in a session.
    pub chunk_bytes: u32,
    /// What the client has of it: the digests of its chunks. None where it has nothing.
    #[serde(default)]
    pub known: Vec<ChunkDigest>,
}

/// A piece.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Piece {
    /// How long the file is now.
    pub size_bytes: u64,
    /// The bytes, in base64; none where the client knows them.
    #[serde(default, skip_serializing_if = "Option::is_none", serialize_with = "write", deserialize_with = "read")]
    pub bytes: Option<Bytes>,
}

fn write<S: Serializer>(bytes: &Option<Bytes>, serializer: S) -> Result<S::Ok, S::Error> {
    bytes.as_ref().map(|bytes| BASE64.encode(bytes)).serialize(serializer)
}

fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Bytes>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    text.map(|text| BASE64.decode(text).map(Bytes::from).map_err(serde::de::Error::custom)).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::MAX_REPLY_BYTES;
    use crate::wire::message::Reply;

    #[test]
    fn a_piece_comes_back_and_fits_into_a_reply() {
        let whole = Bytes::from(vec![0xff; MAX_PIECE_BYTES as usize]);
        for bytes in [None, Some(Bytes::new()), Some(whole)] {
            let reply = Reply::BootFile(Piece { size_bytes: 1 << 29, bytes });
            let text = serde_json::to_string(&reply).unwrap();
            assert!(text.len() < MAX_REPLY_BYTES as usize);
            assert_eq!(serde_json::from_str::<Reply>(&text).unwrap(), reply);
        }
        assert!(serde_json::from_str::<Piece>(r#"{"size_bytes": 1, "bytes": "?"}"#).is_err());
        assert_eq!(serde_json::from_str::<Piece>(r#"{"size_bytes": 1}"#).unwrap().bytes, None);
    }
}
