//! Sealed JSON: the format of the config and of manifests. People can read it, and a flipped bit anywhere is found.
//!
//! ```text
//! file = header ‖ "\n" ‖ body
//! header = {"format":"…","version":N,"length":bytes of the body,"blake3":"64 hex digits of the body"}
//! body = JSON
//! ```
//!
//! The header is compared byte for byte with the one that this program would write, so it needs no checksum. The version
//! is looked at first: a later program may change everything after it.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::repo::digest::Digest;
use crate::repo::error::FormatError;

/// Longest file that is read: the manifest of 256 disks with long names is far below.
pub const MAX_SEALED_BYTES: u64 = 16 << 20;
const MAX_HEADER_BYTES: usize = 512;

#[derive(Serialize, Deserialize)]
struct Header {
    format: String,
    version: u32,
    length: u64,
    blake3: Digest,
}

#[derive(Deserialize)]
struct AnyHeader {
    format: String,
    version: u32,
}

/// What kind of file it is, and the version that is written; older ones are read, too.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// The `format` field.
    pub format: &'static str,
    /// The `version` field.
    pub version: u32,
}

fn header(kind: Kind, body: &[u8]) -> Vec<u8> {
    let digest = Digest::from_bytes(*blake3::hash(body).as_bytes());
    let header =
        Header { format: kind.format.to_owned(), version: kind.version, length: body.len() as u64, blake3: digest };
    serde_json::to_vec(&header).unwrap_or_default()
}

/// The file that holds `value`.
pub fn encode<T: Serialize>(kind: Kind, value: &T) -> Result<Vec<u8>, FormatError> {
    let body = serde_json::to_vec_pretty(value).map_err(|e| FormatError::bad(format!("it cannot be written: {e}")))?;
    let mut out = header(kind, &body);
    out.push(b'\n');
    out.extend_from_slice(&body);
    out.push(b'\n');
    Ok(out)
}

/// The value in a file.
pub fn decode<T: DeserializeOwned>(kind: Kind, file: &[u8]) -> Result<T, FormatError> {
    let newline = file.iter().take(MAX_HEADER_BYTES).position(|b| *b == b'\n');
    let line = &file[..newline.ok_or_else(|| FormatError::bad("it does not begin with a header line"))?];
    let any: AnyHeader =
        serde_json::from_slice(line).map_err(|e| FormatError::bad(format!("its first line is not a header: {e}")))?;
    if any.format != kind.format {
        return Err(FormatError::bad(format!("its header does not say {:?}", kind.format)));
    }
    if any.version > kind.version {
        return Err(FormatError::Newer { version: any.version, supported: kind.version });
    }
    if any.version == 0 {
        return Err(FormatError::bad("its header has no version that ever was"));
    }
    let Some(body) = file[line.len() + 1..].strip_suffix(b"\n") else {
        return Err(FormatError::bad("it is cut short"));
    };
    if line != header(Kind { version: any.version, ..kind }, body) {
        return Err(FormatError::bad("the length or checksum in its first line does not match the rest"));
    }
    serde_json::from_slice(body).map_err(|e| FormatError::bad(format!("its body is not what it should be: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: Kind = Kind { format: "test", version: 2 };

    #[test]
    fn every_flipped_bit_and_cut_is_found() {
        let file = encode(KIND, &vec![1u32, 2, 3]).unwrap();
        assert_eq!(decode::<Vec<u32>>(KIND, &file).unwrap(), [1, 2, 3]);
        for bit in 0..file.len() * 8 {
            let mut twin = file.clone();
            twin[bit / 8] ^= 1 << (bit % 8);
            assert!(decode::<Vec<u32>>(KIND, &twin).is_err(), "bit {bit}");
        }
        for len in 0..file.len() {
            assert!(decode::<Vec<u32>>(KIND, &file[..len]).is_err(), "cut at {len}");
        }
        let later = encode(Kind { version: 3, ..KIND }, &"anything").unwrap();
        let error = decode::<Vec<u32>>(KIND, &later).unwrap_err();
        assert_eq!(error, FormatError::Newer { version: 3, supported: 2 });
    }
}
