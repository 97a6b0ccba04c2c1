//! Reading some blobs, wherever they are, each by itself: for who reads here and there.

use crate::repo::digest::Digest;
use crate::repo::error::RepoError;
use crate::repo::index::set::Location;
use crate::repo::packfile::decode_blob;
use crate::repo::reader::{Reader, Scratch};
use crate::repo::tree::{NODE_BYTES, Node};
use crate::units::MIB;

/// Bytes of a pack that are read at once, at most; a longer blob is read whole.
const MAX_RUN_BYTES: u64 = MIB;

impl Reader {
    /// Reads blobs, given by digest (never [`Digest::ZERO`]) and raw length. `each` gets every one of them once, by its
    /// number, in order. Neighbours in a pack are read with one read; what is damaged is looked for in other copies.
    pub(crate) fn read_each(
        &self,
        scratch: &mut Scratch,
        wanted: &[(Digest, usize)],
        mut each: impl FnMut(usize, Result<Vec<u8>, RepoError>),
    ) {
        let places: Vec<_> =
            wanted.iter().map(|(digest, _)| self.index().find(digest).ok().flatten()).enumerate().collect();
        let joins = |a: &(usize, Option<Location>), b: &(usize, Option<Location>)| {
            let (Some(a), Some(b)) = (a.1, b.1) else { return false };
            a.pack == b.pack
                && a.placed.end() == u64::from(b.placed.offset_bytes)
                // Each window of a pack by itself: runs stay short.
                && a.placed.offset_bytes as u64 / MAX_RUN_BYTES == b.placed.offset_bytes as u64 / MAX_RUN_BYTES
        };
        for run in places.chunk_by(joins) {
            let mut next = run[0].0;
            if let [(_, Some(first)), .., (_, Some(last))] = run {
                let begin = u64::from(first.placed.offset_bytes);
                let len = last.placed.end() - begin;
                if let Ok((zstd, stored)) = self.load(scratch, first.pack, begin, len as usize) {
                    for (number, location) in run.iter().filter_map(|(n, place)| Some((*n, (*place)?))) {
                        let (digest, raw_len) = wanted[number];
                        let from = (u64::from(location.placed.offset_bytes) - begin) as usize;
                        let stored = &stored[from..from + location.placed.stored_len as usize];
                        let mut out = vec![0; raw_len];
                        if location.placed.raw_len as usize != raw_len
                            || decode_blob(zstd, stored, location.placed.codec, &digest, &mut out).is_err()
                        {
                            break;
                        }
                        each(number, Ok(out));
                        next = number + 1;
                    }
                }
            }
            // What is alone, and what is behind something damaged.
            for (number, (digest, raw_len)) in wanted.iter().enumerate().take(run[0].0 + run.len()).skip(next) {
                let mut out = vec![0; *raw_len];
                each(number, self.read_into(scratch, digest, &mut out).map(|()| out));
            }
        }
    }

    /// Reads a node of a tree.
    pub(crate) fn read_node(&self, scratch: &mut Scratch, digest: &Digest) -> Result<Node, RepoError> {
        let mut bytes = [0; NODE_BYTES];
        self.read_into(scratch, digest, &mut bytes)?;
        Node::decode(&bytes).map_err(|e| RepoError::Refused(e.to_string()))
    }
}
