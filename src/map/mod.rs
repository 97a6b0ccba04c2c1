//! Map: a restore point's disks, for any NBD client to read, without restoring them.
//!
//! ```text
//!  NBD client ─► nbd::server ─► disk ─┬─► nodes    which chunks are where: the tree's nodes that were used last
//!                                     ├─► ahead    who reads on gets more than he asked for (pure)
//!                                     └─► chunks   decoded chunks that were used last
//!                                           │ what is not there
//!                                           ▼
//!                                         workers  threads that read packs, decompress, compare digests
//! ```
//!
//! * **States**: [`Map::open`] checks everything and listens; [`Map::serve`] serves until it is told to stop, and says what
//!   was done.
//! * **Never a wrong byte**: every chunk is compared with its digest when it is read. What is damaged is looked for in other
//!   copies; where there is none, reads of it fail, and only these, and the log names the damage once.
//! * **Cost**: nothing is loaded before it is asked for. A read in the middle of a large disk takes a node of each level of
//!   its tree (three for 1 TiB) and its chunks. Kept are 64 MiB of chunks and 8 MiB of nodes, whatever the disks' size.
//! * **Dropping** the future of [`Map::serve`] closes every connection and removes the socket. A kill leaves the socket's
//!   file, which the next map at that path replaces. Nothing else is ever written.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::nbd::server::{Offer, Server, ServerOptions};
use crate::repo::point::PointDisk;
use crate::repo::reader::image::processors;
use crate::repo::{Manifest, Repository};
use crate::units::human_bytes;

mod ahead;
mod chunks;
mod disk;
mod error;
mod listen;
mod lru;
mod nodes;
mod workers;

pub use crate::nbd::server::Totals;
pub use error::MapError;
pub use listen::At;

use chunks::Chunks;
use disk::{MappedDisk, Shared};
use listen::Listening;
use nodes::Nodes;
use workers::Workers;

/// What is served, and where.
#[derive(Clone, Debug, Default)]
pub struct MapOptions {
    /// Which disks; all when empty.
    pub disks: Vec<String>,
    /// Where; a socket in the directory of locks and sockets when `None`.
    pub at: Option<At>,
    /// How clients are treated.
    pub server: ServerOptions,
}

/// A disk that is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// Its name in the point, and that of the export.
    pub disk: String,
    /// Its size.
    pub size_bytes: u64,
    /// Where clients find it.
    pub uri: String,
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapReport {
    /// In figures.
    pub totals: Totals,
    /// For how long it was served.
    pub elapsed: Duration,
}

/// A restore point that is about to be served.
pub struct Map {
    server: Arc<Server>,
    listening: Listening,
    disks: Vec<Mapped>,
}

impl Map {
    /// Opens the repository for reading (the shared lock is held as long as this lives) and listens. Needs a tokio runtime.
    pub async fn open(repo: &Repository, manifest: &Manifest, options: &MapOptions) -> Result<Self, MapError> {
        if manifest.disks.is_empty() {
            return Err(MapError::NoDisks { vm: manifest.vm.clone(), point: manifest.id.short() });
        }
        let names: Vec<_> = options.disks.iter().map(String::as_str).collect();
        let chosen = manifest.choose(&names)?;
        let reader = Arc::new(repo.reader()?);
        let workers = Arc::new(Workers::start(processors())?);
        let chunks = Chunks::new(reader.clone(), workers.clone());
        let shared = Arc::new(Shared { reader, workers, nodes: Nodes::new(), chunks });
        let offer = |disk: &&PointDisk| {
            let name = &disk.disk.name;
            let size = human_bytes(disk.image.size_bytes);
            Offer {
                name: name.clone(),
                description: format!("{name} of {} at {:.0}, {size}", manifest.vm, manifest.instant),
                disk: Arc::new(MappedDisk::new(shared.clone(), &manifest.vm, name, disk.image)),
            }
        };
        let offers = chosen.iter().map(offer).collect();
        let listening = Listening::open(options.at.as_ref(), manifest.id).await?;
        let mapped = |disk: &&PointDisk| Mapped {
            disk: disk.disk.name.clone(),
            size_bytes: disk.image.size_bytes,
            uri: listening.uri(&disk.disk.name),
        };
        let disks = chosen.iter().map(mapped).collect();
        Ok(Self { server: Server::new(offers, options.server), listening, disks })
    }

    /// The disks, in the order in which they were asked for (else that of the point).
    pub fn disks(&self) -> &[Mapped] {
        &self.disks
    }

    /// Serves them until `stop` says true.
    pub async fn serve(self, stop: watch::Receiver<bool>) -> MapReport {
        let begun = Instant::now();
        self.server.serve(&self.listening.listener, stop).await;
        MapReport { totals: self.server.totals(), elapsed: begun.elapsed() }
    }
}
