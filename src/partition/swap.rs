//! The header of a swap area: its first page, whose size is known by where the signature is.
//!
//! ```text
//! page = zeroes[1024] ‖ version u32 ‖ last page u32 ‖ bad pages u32 ‖ UUID[16] ‖ label[16] ‖ zeroes … ‖ "SWAPSPACE2"
//! ```
//!
//! A former swap area that holds something else now must not be taken for one: all that `mkswap` leaves zero must be zero, and
//! there must be no sign of a file system that leaves the page's end alone. An area with a hibernated system in it has another
//! signature (`S1SUSPEND`), and so is none.

use super::{Look, Stop, le_u32};
use crate::extent::Extent;

/// Sizes of a page that a kernel may have.
const PAGES_BYTES: [u64; 5] = [4096, 8192, 16384, 32768, 65536];
const SIGNATURE: &[u8; 10] = b"SWAPSPACE2";
/// What is looked at: the longest header, and where others write their own.
const SEEN_BYTES: u64 = 68 << 10;
/// What `mkswap` and the kernel leave zero: the place of a boot sector, and the rest of the header's fixed part.
const ZEROES: [std::ops::Range<usize>; 2] = [0..1024, 1068..1536];
/// Signs of others: MD 1.2, JFS, ReiserFS, Btrfs.
const OTHERS: [(usize, &[u8]); 4] =
    [(4096, &[0xfc, 0x4e, 0x2b, 0xa9]), (32768, b"JFS1"), (65536 + 52, b"ReIsEr"), (65536 + 64, b"_BHRfS_M")];

/// A swap area.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwapHeader {
    /// Size of a page, and so of the header.
    pub page_bytes: u64,
    /// How long the area is, header included.
    pub len_bytes: u64,
    /// Its UUID, in lower case.
    pub uuid: String,
    /// Its label.
    pub label: String,
}

/// The header of the swap area that these bytes of the disk are; `None` where they are none.
///
/// # Errors
/// What the reader needs.
pub fn swap(area: Extent, look: &mut Look<'_>) -> Result<Option<SwapHeader>, Stop> {
    if area.len_bytes < SEEN_BYTES {
        return Ok(None);
    }
    let head = look(Extent::new(area.offset_bytes, SEEN_BYTES))?;
    Ok(header(&head, area.len_bytes))
}

fn header(head: &[u8], len_bytes: u64) -> Option<SwapHeader> {
    let signed = |page: &u64| head.get(*page as usize - SIGNATURE.len()..*page as usize) == Some(SIGNATURE);
    let page_bytes = PAGES_BYTES.into_iter().find(signed)?;
    let is_zero = |range: std::ops::Range<usize>| head.get(range).is_some_and(|bytes| bytes.iter().all(|b| *b == 0));
    let theirs = OTHERS.iter().any(|(at, sign)| head.get(*at..).is_some_and(|bytes| bytes.starts_with(sign)));
    let (version, last_page, bad_pages) = (le_u32(head, 1024)?, le_u32(head, 1028)?, le_u32(head, 1032)?);
    let end = (u64::from(last_page) + 1).checked_mul(page_bytes)?;
    if theirs || !ZEROES.into_iter().all(is_zero) || version != 1 || last_page == 0 || bad_pages != 0 || end > len_bytes
    {
        return None;
    }
    let text = |bytes: &[u8]| {
        let text: Vec<_> = bytes.iter().copied().take_while(|b| *b != 0).collect();
        String::from_utf8_lossy(&text).chars().filter(|c| !c.is_control()).collect()
    };
    let hex = |range: std::ops::Range<usize>| head[range].iter().map(|b| format!("{b:02x}")).collect::<String>();
    let uuid = [1036..1040, 1040..1042, 1042..1044, 1044..1046, 1046..1052].map(hex).join("-");
    Some(SwapHeader { page_bytes, len_bytes: end, uuid, label: text(&head[1052..1068]) })
}
