//! Estimating: what a backup would read, found without taking one.

use super::harvest::{self, Harvester};
use super::tracking::Plan;
use super::{Vm, internal, qemu_failed, tracking};
use crate::checkpoint::Bitmap;
use crate::units::{CheckpointId, GRANULE_BYTES};
use crate::wire::message::{Begin, Estimated, Failure};

impl Vm {
    /// What a backup would read. Changes nothing in the guest and takes no checkpoint.
    pub async fn estimate(&self, begin: Begin) -> Result<Vec<Estimated>, Failure> {
        let guard = self.claim()?;
        let vm = self.clone();
        // A task of its own: a caller that goes away must not leave a helper node behind.
        let work = tokio::spawn(async move {
            vm.clean_up_now().await?;
            let graph = vm.carried_over().await?;
            let plans = vm.plans(&begin, &graph).await?;
            let result = vm.estimates(&plans, u64::from(begin.chunk_bytes)).await;
            vm.clean_up_now().await?;
            drop(guard);
            result
        });
        work.await.map_err(internal)?
    }

    async fn estimates(&self, plans: &[(Plan, Option<String>)], chunk_bytes: u64) -> Result<Vec<Estimated>, Failure> {
        let mut harvester = Harvester::new(self.monitor().clone(), &self.inner.place.sockets);
        let mut out = vec![];
        for (i, (plan, _)) in plans.iter().enumerate() {
            let mut needed = match &plan.sealed {
                None => Bitmap::full(plan.disk.size_bytes),
                Some(sealed) => {
                    let mut needed = sealed.clone();
                    if let Some(head) = plan.log.last() {
                        let live = self.live_bitmap(i, plan, head, &mut harvester).await?;
                        needed.union_with(&live).map_err(internal)?;
                    }
                    needed
                }
            };
            let skips = self.inner.options.skip.iter().any(|skip| skip.is_for(&plan.disk.name));
            if !skips {
                plan.known.left_out.iter().for_each(|extent| needed.set(*extent));
            }
            needed.round_out(chunk_bytes);
            if skips {
                // Where areas are now, only an instant can tell; most likely where they were.
                plan.known.left_out.iter().for_each(|extent| needed.clear(*extent));
            }
            out.push(Estimated {
                disk: plan.disk.name.clone(),
                size_bytes: plan.disk.size_bytes,
                taken: plan.taken.clone(),
                needed_bytes: needed.count_bytes(),
            });
        }
        Ok(out)
    }

    async fn live_bitmap(
        &self,
        i: usize,
        plan: &Plan,
        head: CheckpointId,
        harvester: &mut Harvester,
    ) -> Result<Bitmap, Failure> {
        let (monitor, names) = (self.monitor(), self.names());
        let (helper, size_bytes) = (names.helper(i), plan.disk.size_bytes);
        harvest::add_helper_node(monitor, &helper, size_bytes).await.map_err(qemu_failed)?;
        tracking::add_bitmap(monitor, &helper, "old", GRANULE_BYTES, true).await.map_err(qemu_failed)?;
        tracking::merge(monitor, (&helper, "old"), &[(&plan.disk.node, &names.since(head))])
            .await
            .map_err(qemu_failed)?;
        harvester.read(&helper, "old", size_bytes).await
    }
}
