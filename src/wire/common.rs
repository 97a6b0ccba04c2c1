//! What all connections of a server share.

use tokio::sync::watch;

use super::packing::Packing;
use super::trunk::Trunks;

/// What a server's connections have in common.
#[derive(Clone, Debug, Default)]
pub struct Common {
    /// The workers that compress.
    pub packing: Packing,
    /// The sessions with several connections, for the client of this one.
    pub trunks: Trunks,
    /// Says true once the server ends: nothing new is answered then, what was begun is.
    pub ending: Option<watch::Receiver<bool>>,
}

impl Common {
    /// Waits for the server's end.
    pub(super) async fn ends(&mut self) {
        match &mut self.ending {
            // Nobody who could say so any more is as good as being told.
            Some(ending) => drop(ending.wait_for(|ending| *ending).await),
            None => std::future::pending().await,
        }
    }
}
