//! Makes disks in xenstore as a toolstack does, for any backend.

use anyhow::Context;
use polldisk::units::{DomId, VbdId};
use polldisk::xen::keys::{self, XenbusState};
use polldisk::xen::store::StoreClient;
use polldisk::xen::vdev::Vdev;
use polldisk::xen::{NodeAccess, Nodes, Permission, Store};
use xenstore_rs::Xs;

use crate::options::{Mode, Plan};

/// A disk that a plan asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The disk's number among all disks, from 1.
    pub number: u32,
    /// The domain's index among all domains, from 0.
    pub domain: usize,
    /// The domain's number.
    pub domid: DomId,
    /// The disk's name in the domain, such as xvda.
    pub vdev: String,
    /// The disk's number in the domain.
    pub vbd: VbdId,
}

impl Place {
    /// Domid and vdev, as `polldisk list` names disks.
    pub fn name(&self) -> String {
        format!("{}:{}", self.domid, self.vdev)
    }
}

/// The disks of a plan, spread over the domains in turn.
pub fn places(plan: &Plan) -> anyhow::Result<Vec<Place>> {
    let options = &plan.options;
    (0..options.disks)
        .map(|index| {
            let domain = index % options.domains;
            let domid = DomId::try_from(u32::from(options.domid.raw()) + domain)?;
            let vdev = format!("xvd{}", letters(index / options.domains));
            let vbd = vdev.parse::<Vdev>()?.id();
            Ok(Place { number: index + 1, domain: domain as usize, domid, vdev, vbd })
        })
        .collect()
}

/// a to z, aa to zz, aaa and so on.
fn letters(index: u32) -> String {
    let mut left = index + 1;
    let mut reversed = Vec::new();
    while left > 0 {
        reversed.push(b'a' + u8::try_from((left - 1) % 26).unwrap_or(0));
        left = (left - 1) / 26;
    }
    reversed.iter().rev().copied().map(char::from).collect()
}

/// Makes both areas of a disk as libxl does, in one transaction.
pub fn make(dom0: &StoreClient, plan: &Plan, place: &Place) -> anyhow::Result<()> {
    let kind = &plan.options.backend_type;
    let frontend = keys::frontend_area(place.domid, place.vbd);
    let backend = keys::backend_area(DomId::DOM0, kind, place.domid, place.vbd);
    let initialising = XenbusState::Initialising.number().to_string();
    let in_frontend = [
        (keys::BACKEND, backend.clone()),
        (keys::BACKEND_ID, DomId::DOM0.to_string()),
        (keys::VIRTUAL_DEVICE, place.vbd.to_string()),
        (keys::DEVICE_TYPE, "disk".to_owned()),
        (keys::STATE, initialising.clone()),
    ];
    let in_backend = backend_nodes(plan, place, &frontend);
    dom0.atomically(|span| {
        for (area, owner, reader) in
            [(&frontend, place.domid, DomId::DOM0), (&backend, DomId::DOM0, place.domid)]
        {
            span.mkdir(area)?;
            span.set_permissions(area, &owned_and_read(owner, reader))?;
        }
        for (node, value) in &in_frontend {
            span.write(&format!("{frontend}/{node}"), value)?;
        }
        for (node, value) in &in_backend {
            span.write(&format!("{backend}/{node}"), value)?;
        }
        span.write(&format!("{backend}/{}", keys::STATE), &initialising)
    })
    .with_context(|| format!("cannot make the areas of disk {}", place.name()))
}

/// The toolstack's nodes in the backend's area, except `state`.
fn backend_nodes(plan: &Plan, place: &Place, frontend: &str) -> Vec<(String, String)> {
    let options = &plan.options;
    let target = options.target.as_deref().unwrap_or_default();
    let kind = match options.backend_type.as_str() {
        "vbd" => "phy",
        other => other,
    };
    let mode = match options.mode {
        Mode::R => "r",
        Mode::W => "w",
    };
    let nodes = [
        (keys::FRONTEND, frontend),
        (keys::FRONTEND_ID, &place.domid.to_string()),
        (keys::ONLINE, "1"),
        (keys::REMOVABLE, "0"),
        (keys::BOOTABLE, "1"),
        (keys::DEV, &place.vdev),
        (keys::TYPE, kind),
        (keys::MODE, mode),
        (keys::DEVICE_TYPE, "disk"),
        (keys::DISCARD_ENABLE, "1"),
        (keys::PARAMS, &target.replace("{n}", &place.number.to_string())),
    ]
    .map(|(node, value)| (node.to_owned(), value.to_owned()));
    nodes.into_iter().chain(plan.nodes.iter().cloned()).collect()
}

/// Permissions of an area: one end owns it, the other may read it, and no other domain has access.
fn owned_and_read(owner: DomId, reader: DomId) -> [Permission; 2] {
    [
        Permission { domid: owner, access: NodeAccess::None },
        Permission { domid: reader, access: NodeAccess::Read },
    ]
}

#[cfg(test)]
mod test {
    use clap::Parser;

    use super::*;
    use crate::options::Options;

    fn plan(line: &str) -> Plan {
        let words = std::iter::once("blkload").chain(line.split_whitespace());
        Options::try_parse_from(words).unwrap().check(&[0]).unwrap()
    }

    #[test]
    fn disks_are_spread_over_the_domains() {
        let places = places(&plan("--target x --disks 5 --domains 2 --domid 7")).unwrap();
        let names: Vec<_> = places.iter().map(Place::name).collect();
        assert_eq!(names, ["7:xvda", "8:xvda", "7:xvdb", "8:xvdb", "7:xvdc"]);
        assert_eq!(places[4].vbd, VbdId(51712 + 32));
        assert_eq!([25, 26, 701, 702].map(letters), ["z", "aa", "zz", "aaa"]);
    }

    #[test]
    fn the_backend_is_told_what_the_options_say() {
        let plan = plan(
            "--target aio:/img{n} --backend-type qdisk --mode r --node direct-io-safe=1 --disks 2",
        );
        let nodes = backend_nodes(&plan, &places(&plan).unwrap()[1], "f");
        let value = |key: &str| {
            let node = nodes.iter().rfind(|(node, _)| node == key);
            node.map(|(_, value)| value.as_str())
        };
        assert_eq!(value("params"), Some("aio:/img2"));
        assert_eq!(
            (value("mode"), value("dev"), value("type")),
            (Some("r"), Some("xvdb"), Some("qdisk"))
        );
        assert_eq!((value("direct-io-safe"), value("online")), (Some("1"), Some("1")));
    }
}
