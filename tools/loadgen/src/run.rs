//! A whole run: starts the platform, the disks and the backend, measures, and ends everything.

use std::slice::{from_mut, from_ref};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use polldisk::output;
use polldisk::sim::blkfront::device::Options as RingOptions;
use polldisk::sim::{StandIn, XENSTORE_SOCKET};
use polldisk::units::DomId;
use polldisk::xen::Platform;
use polldisk::xen::keys;
use polldisk::xen::store::StoreClient;
use xenstore_rs::Xs;

use crate::child::Backend;
use crate::disk::{Disk, Negotiated};
use crate::echo::Echo;
use crate::kernel::{Kernel, SimKernel, XenKernel};
use crate::measure::{Driven, Watched, measure};
use crate::neighbours::{Neighbour, Neighbours};
use crate::options::Plan;
use crate::report::Report;
use crate::toolstack::{self, Place};

/// A disk, and the kernel that it belongs to.
type OfKernel<K> = (K, Disk<<K as Kernel>::Events>);

/// How often connecting disks are checked.
const LOOK: Duration = Duration::from_millis(2);

/// Runs a plan. `interrupted` ends the run early, with an error.
pub fn run(plan: &Plan, interrupted: &AtomicBool) -> anyhow::Result<Report> {
    match plan.options.xen {
        true => on_xen(plan, interrupted),
        false => on_stand_in(plan, interrupted),
    }
}

fn on_stand_in(plan: &Plan, interrupted: &AtomicBool) -> anyhow::Result<Report> {
    let stand_in = match &plan.options.folder {
        None => StandIn::start_temporary(),
        Some(folder) => std::fs::create_dir_all(folder).and_then(|()| StandIn::start(folder)),
    }
    .context("cannot start the stand-in for Xen")?;
    let platform = stand_in.platform();
    let dom0 = platform.open_store()?;
    let places = toolstack::places(plan)?;
    let mut kernels = domains(plan, &stand_in)?;
    let mut disks = Vec::new();
    for place in &places {
        disks.push(make_disk(plan, place, &kernels[place.domain], &dom0)?);
    }
    let neighbours = Neighbours::of(plan)?;
    let mut their_disks = Vec::new();
    for Neighbour { plan, place, .. } in &neighbours.guests {
        let kernel = domains(plan, &stand_in)?;
        their_disks.push(make_disk(plan, place, &kernel[place.domain], &dom0)?);
        kernels.extend(kernel);
    }
    let started = Instant::now();
    let mut server = Server::start(plan, &stand_in, &places)?;
    // Moved here so that it is dropped before the server, which does not end as long as storage hangs.
    let mut neighbours = neighbours;
    if plan.options.command.is_empty() && !plan.options.echo {
        announce(&stand_in);
    }
    let connect = |plan: &Plan, places: &[Place], disks: &mut [_], server: &mut Server| {
        connect(plan, disks, server, interrupted)
            .map_err(|error| add_backend_errors(error, &dom0, plan, places))
    };
    connect(plan, &places, &mut disks, &mut server)?;
    let connect_time = started.elapsed();
    for (Neighbour { plan, place, .. }, disk) in neighbours.guests.iter().zip(&mut their_disks) {
        connect(plan, from_ref(place), from_mut(disk), &mut server).context("a neighbour")?;
    }
    let beside = (&mut neighbours, &mut their_disks[..]);
    let driven = drive(plan, &mut disks, beside, &mut server, interrupted)?;
    let mapped: usize = kernels.iter().filter_map(Kernel::mapped).sum();
    if mapped > 0 {
        output::say(format_args!(
            "the backend still has {mapped} pages mapped, although its disks are closed"
        ));
    }
    let kind = server.kind();
    server.end()?;
    Ok(Report::new(plan, kind, connect_time, &driven))
}

/// Makes a disk of a domain, and its areas in xenstore unless the backend makes them.
fn make_disk(
    plan: &Plan,
    place: &Place,
    kernel: &SimKernel,
    dom0: &StoreClient,
) -> anyhow::Result<OfKernel<SimKernel>> {
    if !plan.options.no_toolstack {
        toolstack::make(dom0, plan, place)?;
    }
    Ok((kernel.clone(), Disk::new(kernel, place.name(), place.vbd)?))
}

/// Makes the domains, each with enough memory for the rings and buffers of its disks.
fn domains(plan: &Plan, stand_in: &StandIn) -> anyhow::Result<Vec<SimKernel>> {
    let options = &plan.options;
    let disks = options.disks.div_ceil(options.domains);
    let pages = disks * u32::try_from(plan.wanted.pages())?;
    (0..options.domains)
        .map(|index| {
            let domid = DomId::try_from(u32::from(options.domid.raw()) + index)?;
            Ok(SimKernel(Arc::new(stand_in.create_domain(domid, pages)?)))
        })
        .collect()
}

fn announce(stand_in: &StandIn) {
    let folder = stand_in.folder();
    output::say(format_args!(
        "waiting for a backend with POLLDISK_STAND_IN={} XENSTORED_PATH={}",
        folder.display(),
        folder.join(XENSTORE_SOCKET).display()
    ));
}

fn on_xen(plan: &Plan, interrupted: &AtomicBool) -> anyhow::Result<Report> {
    let vdev = plan.options.vdev.context("--xen needs --vdev")?;
    let kernel = XenKernel::open()?;
    let own = kernel.open_store()?.read(keys::OWN_DOMID)?;
    let disk = Disk::new(&kernel, format!("{own}:{vdev}"), vdev.id())?;
    let mut disks = [(kernel, disk)];
    let mut server = Server::Other { kind: "xen", pid: plan.options.pid };
    let started = Instant::now();
    connect(plan, &mut disks, &mut server, interrupted)?;
    let connect = started.elapsed();
    let nobody = (&mut Neighbours::default(), &mut [][..]);
    let driven = drive(plan, &mut disks, nobody, &mut server, interrupted)?;
    Ok(Report::new(plan, "xen", connect, &driven))
}

/// Connects all disks.
fn connect<K: Kernel>(
    plan: &Plan,
    disks: &mut [OfKernel<K>],
    server: &mut Server,
    interrupted: &AtomicBool,
) -> anyhow::Result<()> {
    let end = Instant::now() + plan.patience;
    loop {
        let mut waiting = Vec::new();
        for (kernel, disk) in disks.iter_mut() {
            if !disk.step(kernel, plan)? {
                waiting.push(disk.standing());
            }
        }
        if waiting.is_empty() {
            return Ok(());
        }
        if interrupted.load(Ordering::Relaxed) {
            bail!("interrupted; {}", waiting.join("; "));
        }
        server.check()?;
        if Instant::now() > end {
            let patience = plan.patience.as_secs_f64();
            let (waiting, output) = (waiting.join("; "), server.last_output());
            bail!("no connection within {patience} s (--patience): {waiting}{output}");
        }
        std::thread::sleep(LOOK);
    }
}

/// Adds what backends wrote to the disks' `error` nodes.
fn add_backend_errors(
    error: anyhow::Error,
    dom0: &StoreClient,
    plan: &Plan,
    places: &[Place],
) -> anyhow::Error {
    let kind = &plan.options.backend_type;
    let told: Vec<String> = places
        .iter()
        .filter_map(|place| {
            let area = keys::error_area(DomId::DOM0, kind, place.domid, place.vbd);
            let text = dom0.read(&format!("{area}/error")).ok()?;
            Some(format!("{}: {text}", place.name()))
        })
        .collect();
    match told.is_empty() {
        true => error,
        false => error.context(format!("the backend reports for disk {}", told.join("; "))),
    }
}

/// Measures on connected disks, beside neighbours on theirs, and closes all of them.
fn drive<K: Kernel>(
    plan: &Plan,
    disks: &mut [OfKernel<K>],
    (neighbours, their_disks): (&mut Neighbours, &mut [OfKernel<K>]),
    server: &mut Server,
    interrupted: &AtomicBool,
) -> anyhow::Result<Driven> {
    let negotiated: Vec<_> = disks.iter().filter_map(|(_, disk)| disk.negotiated(plan)).collect();
    if let Some(first) = negotiated.first() {
        tell_differences(&plan.wanted.options, plan.wanted.queues, first);
    }
    let Neighbours { guests, storage } = neighbours;
    let mut beside = Vec::new();
    let mut theirs = Vec::new();
    for (neighbour, (_, disk)) in guests.iter().zip(&mut *their_disks) {
        theirs.extend(disk.negotiated(&neighbour.plan).map(|disk| (neighbour.habit.name, disk)));
        beside.push((neighbour, disk));
    }
    let connected = disks.iter_mut().map(|(_, disk)| disk).collect();
    let measured = measure(plan, connected, (beside, storage), server, interrupted)?;
    for (_, disk) in disks.iter_mut().chain(their_disks) {
        if let Err(error) = disk.close() {
            output::say(format_args!("{error:#}"));
        }
    }
    Ok(Driven { measured, disks: negotiated, neighbours: theirs })
}

/// Reports each feature of which the backend offers less than was asked for.
fn tell_differences(wanted: &RingOptions, queues: usize, agreed: &Negotiated) {
    let tell = |what: &str, wanted: &dyn std::fmt::Display, got: &dyn std::fmt::Display| {
        output::say(format_args!("the backend does not offer {what} {wanted}: {got} is used"));
    };
    if queues != agreed.queues {
        tell("--queues", &queues, &agreed.queues);
    }
    if wanted.ring_order != agreed.ring_order {
        tell("--ring-order", &wanted.ring_order, &agreed.ring_order);
    }
    if wanted.buffers != agreed.depth {
        tell("--depth", &wanted.buffers, &agreed.depth);
    }
    if wanted.persistent && !agreed.persistent {
        output::say(format_args!("the backend does not offer persistent grants"));
    }
}

/// The backend that serves the disks.
enum Server {
    Child { backend: Backend, pid: u32 },
    Echo(Echo),
    Other { kind: &'static str, pid: Option<u32> },
}

impl Server {
    fn start(plan: &Plan, stand_in: &StandIn, places: &[Place]) -> anyhow::Result<Server> {
        let options = &plan.options;
        if options.echo {
            let rings = places.len() * usize::from(options.queues);
            // The load has the first cores, the echo has the next ones.
            let mut cores = plan.cores.clone();
            let taken = rings % cores.len().max(1);
            cores.rotate_left(taken);
            return Ok(Server::Echo(Echo::start(
                &stand_in.platform(),
                &options.backend_type,
                places,
                &cores,
            )?));
        }
        if options.command.is_empty() {
            return Ok(Server::Other { kind: "other", pid: options.pid });
        }
        let backend = Backend::start(&options.command, stand_in.folder(), options.verbose)?;
        let pid = options.pid.unwrap_or(backend.pid());
        Ok(Server::Child { backend, pid })
    }

    fn kind(&self) -> &'static str {
        match self {
            Server::Child { .. } => "child",
            Server::Echo(_) => "echo",
            Server::Other { kind, .. } => kind,
        }
    }

    fn last_output(&self) -> String {
        match self {
            Server::Child { backend, .. } => backend.last_output(),
            _ => String::new(),
        }
    }

    fn end(self) -> anyhow::Result<()> {
        if let Server::Child { backend, .. } = self
            && !backend.end()?
        {
            output::say(format_args!("the backend did not end after SIGTERM and was killed"));
        }
        Ok(())
    }
}

impl Watched for Server {
    fn check(&mut self) -> anyhow::Result<()> {
        match self {
            Server::Child { backend, .. } => backend.check(),
            Server::Echo(echo) => echo.check(),
            Server::Other { .. } => Ok(()),
        }
    }

    fn pid(&self) -> Option<u32> {
        match self {
            Server::Child { pid, .. } => Some(*pid),
            Server::Echo(_) => None,
            Server::Other { pid, .. } => *pid,
        }
    }

    fn is_here(&self) -> bool {
        matches!(self, Server::Echo(_))
    }
}
