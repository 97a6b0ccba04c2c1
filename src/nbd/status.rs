//! Block status of any range: whole dirty bitmaps, or the allocation of a whole disk.

use futures_util::{StreamExt, stream};

use super::client::Client;
use super::error::NbdError;
use super::layout::Descriptor;
use super::proto::MAX_REQUEST_BYTES;
use crate::extent::Extent;

/// Windows that are asked for at once. A window's answer is at most 65,536 granules long, half a mebibyte.
const AHEAD: usize = 4;

impl Client {
    /// Calls `each` for every run of equal flags of a negotiated context over `extent`, in order, without gaps,
    /// neighbours merged. `extent` may be any length within the export; an empty one calls nothing.
    ///
    /// 1 TiB takes 257 requests of at most [`MAX_REQUEST_BYTES`], a few at a time; memory stays bounded by what they
    /// bring. Fails at the first request that fails: what was delivered until then is right but not all. May be
    /// cancelled by dropping it.
    pub async fn block_status_all(
        &self,
        context: &str,
        extent: Extent,
        mut each: impl FnMut(Extent, u32),
    ) -> Result<(), NbdError> {
        self.context(context)?;
        if extent.len_bytes == 0 {
            return Ok(());
        }
        self.check("ask the block status of", extent, u64::MAX)?;
        let windows = windows(extent);
        let mut answers = stream::iter(windows).map(|window| self.window_status(context, window)).buffered(AHEAD);
        let mut run: Option<(Extent, u32)> = None;
        let mut at = extent.offset_bytes;
        while let Some(answer) = answers.next().await {
            for (len, flags) in answer? {
                let len = u64::from(len);
                match &mut run {
                    Some((grown, same)) if *same == flags => grown.len_bytes += len,
                    _ => {
                        if let Some((done, flags)) = run.replace((Extent::new(at, len), flags)) {
                            each(done, flags);
                        }
                    }
                }
                at += len;
            }
        }
        debug_assert_eq!(at, extent.end());
        if let Some((done, flags)) = run {
            each(done, flags);
        }
        Ok(())
    }

    /// The descriptors of exactly `window`, in as many requests as the server makes of it.
    async fn window_status(&self, context: &str, window: Extent) -> Result<Vec<Descriptor>, NbdError> {
        let mut all = vec![];
        let mut at = window.offset_bytes;
        while at < window.end() {
            // Every answer holds at least one descriptor, none is empty, all lie within what was asked: this ends.
            let part = self.block_status(context, Extent::between(at, window.end())).await?;
            at += part.iter().map(|(len, _)| u64::from(*len)).sum::<u64>();
            if all.is_empty() { all = part } else { all.extend(part) }
        }
        Ok(all)
    }
}

/// `extent` in pieces of at most [`MAX_REQUEST_BYTES`].
fn windows(extent: Extent) -> impl Iterator<Item = Extent> {
    (extent.offset_bytes..extent.end())
        .step_by(MAX_REQUEST_BYTES as usize)
        .map(move |at| Extent::between(at, at.saturating_add(MAX_REQUEST_BYTES).min(extent.end())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tebibyte_is_257_windows() {
        let all: Vec<_> = windows(Extent::new(512, 1 << 40)).collect();
        assert_eq!(all.len(), 257);
        assert_eq!((all[0].offset_bytes, all[256].end()), (512, 512 + (1 << 40)));
        assert!(all.windows(2).all(|w| w[0].end() == w[1].offset_bytes && w[0].len_bytes == MAX_REQUEST_BYTES));
    }
}
