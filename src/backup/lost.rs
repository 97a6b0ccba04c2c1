//! What an incremental would take over from an earlier point, and the repository has lost: found before it begins.
//!
//! A chunk that is not sent is taken over by its digest. Where a pack is missing, or a verification found damage, the new point
//! could not be restored either. So the trees that disks go on from are walked then; a disk that lacks something is scanned,
//! and what was lost is sent again. In a repository of which nothing is known to be lost it costs nothing.

use crate::backup::plan::Plan;
use crate::extent::Extent;
use crate::repo::{Image, Reader, RepoError};

/// The first disk that goes on from what is lost, with what is; `reader` has a writer's index. Blocks.
pub fn find(reader: &Reader, plan: &Plan) -> Option<(String, RepoError)> {
    if !reader.index().lacks_something() {
        return None;
    }
    plan.bases.iter().find_map(|(disk, base)| Some((disk.clone(), lost(reader, base.image)?)))
}

fn lost(reader: &Reader, image: Image) -> Option<RepoError> {
    reader.walk(image, Extent::new(0, image.size_bytes)).find_map(|chunk| match chunk {
        Err(broken) => Some(*broken.source),
        Ok(chunk) => match reader.index().find(&chunk.digest) {
            Ok(Some(_)) => None,
            Ok(None) => Some(RepoError::Missing { digest: chunk.digest }),
            Err(error) => Some(error),
        },
    })
}
