//! What holds a regime's collectives back, when everything that was told is put together: ports and their flows, devices,
//! bytes, what network steps waited for, and the CPUs that serve them all.

use super::ledger::{Ledger, RankLedger};
use super::network::{self, Pressure};
use super::waits::Says;
use crate::budget::arith::mul_div;
use crate::facts::PPM;
use crate::links::{Finding, Severity};
use crate::time::Window;

/// A thread that wants a CPU for this share of its time runs on a host with too few, parts per million.
const STARVED_PPM: u64 = 100_000;

/// Share of a regime that a port must have been watched, parts per million, for its bytes to be compared.
const COVERED_PPM: u64 = 500_000;
/// More bytes on the wire for the same payload than in the healthy regime, parts per million: another algorithm.
const WASTEFUL_PPM: u64 = 1_150_000;

impl Ledger {
    /// Bytes the ports send for a byte that the collectives were given, parts per million. Both are taken as rates, because
    /// what watches the ports may begin later than what counts the calls; `None` where it saw too little of the regime.
    fn on_wire_ppm(&self) -> Option<u64> {
        let length_ns = self.window.len_ns();
        let covers = |ns: u64| ns >= mul_div(length_ns, COVERED_PPM, PPM);
        if !self.ports.iter().all(|port| covers(port.window_ns)) {
            return None;
        }
        let sent = self
            .ports
            .iter()
            .map(|port| mul_div(port.sent_bytes, length_ns, port.window_ns));
        let given = self
            .ranks
            .iter()
            .map(|rank| mul_div(rank.comm_bytes, length_ns, rank.window_ns));
        let (sent, given) = (
            sent.fold(0, u64::saturating_add),
            given.fold(0, u64::saturating_add),
        );
        (sent > 0 && given > 0).then(|| mul_div(sent, PPM, given))
    }
}

/// The finding about links that is there now and was not in the healthy regime: the worst of them. One that was there
/// all the time does not tell what the difference is.
pub(super) fn began(findings: &[Finding], now: Window, healthy: Window) -> Option<&Finding> {
    let slows =
        |finding: &&Finding| finding.cause.slows_communication() && finding.severity >= Severity::Degraded;
    let common_ns =
        |finding: &Finding, window: Window| finding.window.intersect(window).map_or(0, Window::len_ns);
    findings.iter().filter(slows).find(|finding| {
        common_ns(finding, now) > 0 && common_ns(finding, healthy).saturating_mul(4) <= healthy.len_ns()
    })
}

/// What holds the collectives back: a port, the way between two, who takes the bytes in, the links inside a node, or the
/// way they are done.
pub(super) fn of(ledger: &Ledger, base: Option<&Ledger>, link: Option<&Finding>, says: Says) -> Pressure {
    let mut of_ports = network::pressure(&ledger.ports, base.map(|base| base.ports.as_slice()));
    if matches!(of_ports, Pressure::Port(_) | Pressure::Lossy(_)) {
        return of_ports;
    }
    if let Some(link) = link {
        return Pressure::Link(link.cause);
    }
    // Sockets are served by CPUs: where threads wait for one, busy flows say nothing of the network. What the links
    // and the bytes say stays.
    let starved = is_starved(&ledger.ranks, base.map(|base| base.ranks.as_slice()));
    let by_cpus = matches!(
        of_ports,
        Pressure::Fabric | Pressure::Receiver(_) | Pressure::Behind(_)
    );
    if by_cpus && starved {
        of_ports = Pressure::None;
    }
    if matches!(of_ports, Pressure::Receiver(_) | Pressure::Behind(_)) && ledger.is_held_back() {
        of_ports = Pressure::None;
    }
    let down = |ledger: &Ledger| {
        ledger
            .ranks
            .iter()
            .map(|rank| rank.nvlinks_down)
            .max()
            .unwrap_or(0)
    };
    if down(ledger) > base.map_or(0, down) {
        return Pressure::Nvlink;
    }
    // A process that takes nothing in is a nearer reason than what it does to the bytes.
    if matches!(of_ports, Pressure::Receiver(_) | Pressure::Behind(_)) {
        return of_ports;
    }
    if let (Some(now), Some(before)) = (ledger.on_wire_ppm(), base.and_then(Ledger::on_wire_ppm))
        && now >= mul_div(before, WASTEFUL_PPM, PPM)
    {
        return Pressure::Config;
    }
    of_waits(of_ports, says, starved || ledger.is_held_back())
}

/// Flows that are busy, or tell nothing, are no match for what NCCL's own threads waited for. They too are served by CPUs.
fn of_waits(of_ports: Pressure, says: Says, lacks_cpu: bool) -> Pressure {
    match (of_ports, says) {
        (Pressure::Fabric | Pressure::None, Says::Slow(slow)) if !lacks_cpu => Pressure::Waits(slow),
        (Pressure::Fabric, Says::Late(_) | Says::AsBefore) => Pressure::None,
        _ => of_ports,
    }
}

/// Whether the launching thread of any rank wants a CPU for much of its time, and more than in the healthy regime.
fn is_starved(ranks: &[RankLedger], base: Option<&[RankLedger]>) -> bool {
    let most = |ranks: &[RankLedger]| {
        let wanted = ranks.iter().map(|rank| rank.share_ppm(rank.runnable_ns));
        wanted.max().unwrap_or(0)
    };
    most(ranks) >= STARVED_PPM.max(base.map_or(0, most).saturating_mul(2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::network::PortLoad;

    fn wanting(share_ppm: u64) -> Vec<RankLedger> {
        let rank = |runnable_ns| RankLedger {
            window_ns: 1_000_000_000,
            runnable_ns,
            ..RankLedger::default()
        };
        vec![rank(0), rank(share_ppm * 1_000)]
    }

    #[test]
    fn a_host_is_starved_when_its_threads_want_a_cpu_more_than_they_used_to() {
        assert!(is_starved(&wanting(180_000), None));
        assert!(is_starved(&wanting(180_000), Some(&wanting(33_000))));
        assert!(
            !is_starved(&wanting(50_000), Some(&wanting(10_000))),
            "a busy host"
        );
        assert!(
            !is_starved(&wanting(180_000), Some(&wanting(150_000))),
            "as before"
        );
        assert!(!is_starved(&[], None));
    }

    /// Two nodes that ran for 10 s and sent `per_s` a second while `watched_s` of them were watched.
    fn running(per_s: u64, watched_s: u64) -> Ledger {
        let second = 1_000_000_000;
        let port = |node: &str| PortLoad {
            node: node.into(),
            sent_bytes: per_s * watched_s,
            window_ns: watched_s * second,
            ..PortLoad::default()
        };
        let rank = || RankLedger {
            comm_bytes: 20_000_000,
            window_ns: 10 * second,
            ..RankLedger::default()
        };
        Ledger {
            steps: 0..20,
            window: Window::new(5 * second, 15 * second).unwrap_or_default(),
            ranks: vec![rank(), rank()],
            ports: vec![port("a"), port("b")],
            pressure: Pressure::None,
            link: None,
            baseline: None,
            total_ns: 20 * second,
            median_step_ns: second / 2,
            is_fixed: false,
            noise_ppm: 0,
            late_steps: 0,
            waits: Vec::new(),
            says: Says::Nothing,
        }
    }

    #[test]
    fn another_algorithm_is_told_by_rates_of_bytes() {
        let whole = running(3_000_000, 10);
        let before = running(2_000_000, 7);
        assert_eq!(of(&whole, Some(&before), None, Says::Nothing), Pressure::Config);
        let late = running(3_000_000, 7);
        assert_eq!(
            of(&whole, Some(&late), None, Says::Nothing),
            Pressure::None,
            "the same rate, watched from later on"
        );
        assert_eq!(
            of(&whole, Some(&running(2_000_000, 3)), None, Says::Nothing),
            Pressure::None,
            "watched too little to tell"
        );
    }
}
