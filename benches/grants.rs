//! Pages that stay mapped: lookups that hit and miss, mapping and unmapping on the stand-in.
//!
//! Mapping on the stand-in costs a message to its hypervisor and an mmap for each run of pages;
//! a real dom0 makes a system call, a hypercall and page table updates. So this shows polldisk's own
//! cost, not Xen's.
#![allow(missing_docs)]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use polldisk::budget::{GrantBudget, GrantShare};
use polldisk::engine::host::HostEngine;
use polldisk::limits::{
    GRANTS_PER_MAP_BATCH, PERSISTENT_GRANTS_PER_DOMAIN, PERSISTENT_GRANTS_PER_QUEUE,
    SEGMENTS_PER_REQUEST,
};
use polldisk::queue::persistent::{Mapper, PersistentGrants};
use polldisk::sim::grants::SimGrants;
use polldisk::sim::{Domain, Gfn, StandIn};
use polldisk::units::{DomId, GrantRef};
use polldisk::xen::{PageAccess, Platform};

/// A guest whose granted pages a queue keeps mapped.
struct Rig {
    persistent: PersistentGrants,
    grants: SimGrants,
    engine: HostEngine,
    domid: DomId,
    refs: Vec<GrantRef>,
    _domain: Domain,
    _stand_in: StandIn,
}

impl Rig {
    /// A guest with this many pages, all granted and none mapped.
    fn new(pages: usize) -> Rig {
        let stand_in = StandIn::start_temporary().unwrap();
        let domid = DomId::try_from(1).unwrap();
        let pages = u32::try_from(pages).unwrap();
        let domain = stand_in.create_domain(domid, pages).unwrap();
        let first = domain.alloc_pages(pages).unwrap().0;
        let grant = |gfn| domain.grant(Gfn(gfn), DomId::DOM0, PageAccess::ReadWrite).unwrap();
        let budget = Arc::new(GrantBudget::new(PERSISTENT_GRANTS_PER_DOMAIN));
        Rig {
            persistent: PersistentGrants::new(GrantShare::of(budget)),
            grants: stand_in.platform().open_grants().unwrap(),
            engine: HostEngine::new().unwrap(),
            domid,
            refs: (first..first + pages).map(grant).collect(),
            _domain: domain,
            _stand_in: stand_in,
        }
    }

    /// Maps all that is not mapped.
    fn map(&mut self, wanted: &mut Vec<GrantRef>) {
        wanted.clone_from(&self.refs);
        let mut mapper = Mapper { grants: &mut self.grants, engine: &mut self.engine };
        self.persistent.map(&mut mapper, self.domid, wanted, std::iter::empty());
        assert_eq!(self.persistent.count(), self.refs.len());
    }

    fn unmap_all(&mut self) {
        let mut mapper = Mapper { grants: &mut self.grants, engine: &mut self.engine };
        self.persistent.unmap_all(&mut mapper);
    }
}

/// Pages mapped: one batch, and as many as a queue may have.
const MAPPED: [usize; 2] = [GRANTS_PER_MAP_BATCH, PERSISTENT_GRANTS_PER_QUEUE];

fn lookups(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("grants");
    for mapped in MAPPED {
        let mut rig = Rig::new(mapped);
        rig.map(&mut Vec::new());
        let refs: Vec<u32> = rig.refs.iter().map(|gref| gref.0).collect();
        // Requests use one buffer of the guest after the other.
        for segments in [1, SEGMENTS_PER_REQUEST] {
            let mut requests = refs.chunks_exact(segments).cycle();
            group.throughput(Throughput::Elements(segments as u64));
            group.bench_function(
                format!("hit, {mapped} mapped, segments: {segments}"),
                |bencher| {
                    bencher.iter(|| {
                        for gref in requests.next().unwrap() {
                            black_box(rig.persistent.page(*gref).unwrap());
                        }
                    });
                },
            );
        }
        let unmapped = refs.iter().max().unwrap() + 1;
        let mut missed = (unmapped..unmapped + 1024).cycle();
        group.throughput(Throughput::Elements(1));
        group.bench_function(format!("miss, {mapped} mapped"), |bencher| {
            bencher.iter(|| assert!(rig.persistent.page(missed.next().unwrap()).is_none()));
        });
    }
    group.finish();
}

fn mappings(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("grants");
    for pages in [1, SEGMENTS_PER_REQUEST, GRANTS_PER_MAP_BATCH] {
        let mut rig = Rig::new(pages);
        let mut wanted = Vec::new();
        group.throughput(Throughput::Elements(pages as u64));
        group.bench_function(format!("mapped and unmapped, pages: {pages}"), |bencher| {
            bencher.iter(|| {
                rig.map(&mut wanted);
                rig.unmap_all();
            });
        });
    }
    group.finish();
}

criterion_group!(benches, lookups, mappings);
criterion_main!(benches);
