//! What the guest has written: the oracle that the disk is held against.
//!
//! `bytes of a block = f(seed, block, generation)`, so that four bytes for each block of 4 KiB are all that must be kept.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::units::MIB;

/// Unit of what the guest writes.
pub const BLOCK_BYTES: usize = 4096;
/// A block of which nobody knows what it holds: its write failed.
const UNKNOWN: u32 = u32::MAX;

/// How often each block was written.
#[derive(Clone, Debug)]
pub struct Model {
    seed: u64,
    generations: Vec<u32>,
}

/// A quick generator of numbers that nobody needs to be surprised by.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// Always the same numbers for a seed.
    pub fn seeded(seed: u64) -> Self {
        Self(mixed(seed) | 1)
    }

    /// The next one.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// One below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.number()) * u128::from(limit)) >> 64) as u64
    }
}

fn mixed(number: u64) -> u64 {
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}

impl Model {
    /// A disk of so many blocks, of generation 0.
    pub fn new(seed: u64, blocks: u64) -> Self {
        Self { seed, generations: vec![0; blocks as usize] }
    }

    /// How many blocks it has.
    pub fn blocks(&self) -> u64 {
        self.generations.len() as u64
    }

    /// Counts a write of the block; gives what is to be written.
    pub fn write(&mut self, block: u64, bytes: &mut [u8]) {
        let generation = &mut self.generations[block as usize];
        *generation = if *generation >= UNKNOWN - 1 { 1 } else { *generation + 1 };
        fill(self.seed, block, self.generations[block as usize], bytes);
    }

    /// The write of a block failed.
    pub fn forget(&mut self, block: u64) {
        self.generations[block as usize] = UNKNOWN;
    }

    /// Whether the beginning of a block is what was written there.
    pub fn begins_right(&self, block: u64, bytes: &[u8]) -> bool {
        let generation = self.generations[block as usize];
        generation == UNKNOWN || bytes.get(..16) == Some(&beginning(block, generation)[..])
    }

    /// Writes all of generation 0 to a new image. `progress` is told how many bytes are done, and says whether to go on.
    pub fn lay_out(&self, image: &File, mut progress: impl FnMut(u64) -> bool) -> io::Result<()> {
        let mut piece = vec![0; MIB as usize];
        let mut at = 0;
        while at < self.blocks() {
            let count = (piece.len() / BLOCK_BYTES).min((self.blocks() - at) as usize);
            for (i, bytes) in piece.chunks_exact_mut(BLOCK_BYTES).take(count).enumerate() {
                fill(self.seed, at + i as u64, 0, bytes);
            }
            image.write_all_at(&piece[..count * BLOCK_BYTES], at * BLOCK_BYTES as u64)?;
            at += count as u64;
            if !progress(at * BLOCK_BYTES as u64) {
                return Err(io::ErrorKind::Interrupted.into());
            }
        }
        Ok(())
    }

    /// The first block of an image that does not hold what was written last.
    pub fn first_wrong(&self, image: &File) -> io::Result<Option<u64>> {
        let (mut found, mut right) = (vec![0; MIB as usize], vec![0; BLOCK_BYTES]);
        let mut at = 0;
        while at < self.blocks() {
            let count = (found.len() / BLOCK_BYTES).min((self.blocks() - at) as usize);
            image.read_exact_at(&mut found[..count * BLOCK_BYTES], at * BLOCK_BYTES as u64)?;
            for (block, bytes) in (at..at + count as u64).zip(found.chunks_exact(BLOCK_BYTES)) {
                let generation = self.generations[block as usize];
                fill(self.seed, block, generation, &mut right);
                if generation != UNKNOWN && bytes != right {
                    return Ok(Some(block));
                }
            }
            at += count as u64;
        }
        Ok(None)
    }
}

fn beginning(block: u64, generation: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&block.to_le_bytes());
    bytes[8..].copy_from_slice(&u64::from(generation).to_le_bytes());
    bytes
}

/// The bytes of a block: incompressible but for their beginning, which says what they are.
fn fill(seed: u64, block: u64, generation: u32, bytes: &mut [u8]) {
    let mut rng = Rng::seeded(mixed(seed ^ block) ^ u64::from(generation));
    for word in bytes.chunks_exact_mut(8) {
        word.copy_from_slice(&rng.number().to_le_bytes());
    }
    if let Some(head) = bytes.get_mut(..16) {
        head.copy_from_slice(&beginning(block, generation));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_that_differs_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let image = std::fs::OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
        let mut model = Model::new(7, 300);
        model.lay_out(&image, |_| true).unwrap();
        assert_eq!(model.first_wrong(&image).unwrap(), None);
        let mut bytes = vec![0; BLOCK_BYTES];
        model.write(299, &mut bytes);
        assert_eq!(model.first_wrong(&image).unwrap(), Some(299));
        image.write_all_at(&bytes, 299 * BLOCK_BYTES as u64).unwrap();
        assert_eq!(model.first_wrong(&image).unwrap(), None);
        assert!(model.begins_right(299, &bytes) && !model.begins_right(298, &bytes));
        // The very last byte counts, and a block whose write failed does not.
        image.write_all_at(&[bytes[BLOCK_BYTES - 1] ^ 1], 300 * BLOCK_BYTES as u64 - 1).unwrap();
        assert_eq!(model.first_wrong(&image).unwrap(), Some(299));
        model.forget(299);
        assert_eq!(model.first_wrong(&image).unwrap(), None);
        assert!(model.lay_out(&image, |_| false).is_err());
    }

    #[test]
    fn numbers_stay_below_their_limit_and_reach_it() {
        let mut rng = Rng::seeded(1);
        let seen: std::collections::BTreeSet<_> = (0..1000).map(|_| rng.below(7)).collect();
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 6]);
    }
}
