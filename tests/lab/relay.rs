//! A router of the test's own between the lab's two segments, which loses tunnel datagrams, doubles them and lets others overtake
//! them: a bad network, whose every misdeed is counted.

use super::wire::{LONGEST, Wire};
use flannel::{
    lab::Lab,
    packet::{IpPacket, Ipv4Packet, UdpDatagram, protocol},
};
use mio::{Events, Interest, Poll, Token, Waker, unix::SourceFd};
use std::{
    collections::VecDeque,
    io::ErrorKind,
    os::fd::AsRawFd,
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// The tunnel's port, the default of `Backend.Port`.
const PORT: u16 = 8285;

/// How many datagrams overtake one that is held back, and how long it is held if there are not as many.
const OVERTAKING: usize = 3;
const HELD: Duration = Duration::from_millis(5);

/// What may wait for the router: more than a second's of what the tests send.
const QUEUE: u32 = 10_000;

/// What the router is to do, each to so many of 1,000 tunnel datagrams.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Mischief {
    pub(crate) lose: u32,
    pub(crate) double: u32,
    pub(crate) hold_back: u32,
}

/// What it has done to tunnel datagrams that hold UDP, in both directions together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Done {
    pub(crate) passed: u64,
    pub(crate) lost: u64,
    pub(crate) doubled: u64,
    pub(crate) held_back: u64,
}

/// Ends when it is dropped, and with it the way between the segments.
pub(crate) struct Relay {
    plan: Arc<Mutex<(Mischief, Done)>>,
    stop: Waker,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// From now on everything between the hosts of the two segments passes here, as it is at first. Both must have hosts.
    pub(crate) fn between_segments(lab: &Lab) -> Relay {
        let switch = lab.switch();
        // Packets come in where, by the routes, their senders are not.
        for key in ["ipv4/conf/all/rp_filter", "ipv4/conf/default/rp_filter"] {
            switch.sysctl(key, "0").unwrap();
        }
        // Into the first wire goes what is for the second segment, and out of the second one it comes; and the reverse.
        let wires = [("br0", "192.168.78.0/24", 101), ("br1", "192.168.77.0/24", 102)].map(|(bridge, to, table)| {
            let wire = Wire::open(switch, 1_500, &[]);
            let name = wire.name();
            for line in [
                format!("link set {name} txqueuelen {QUEUE}"),
                format!("route add {to} dev {name} table {table}"),
                format!("rule add iif {bridge} to {to} lookup {table}"),
            ] {
                switch.ip(&line).unwrap();
            }
            wire
        });
        let poll = Poll::new().unwrap();
        for (token, wire) in wires.iter().enumerate() {
            poll.registry()
                .register(&mut SourceFd(&wire.as_raw_fd()), Token(token), Interest::READABLE)
                .unwrap();
        }
        let stop = Waker::new(poll.registry(), Token(wires.len())).unwrap();
        let plan = Arc::<Mutex<(Mischief, Done)>>::default();
        let planned = Arc::clone(&plan);
        let thread = thread::spawn(move || relay(poll, &wires, &planned));
        Relay {
            plan,
            stop,
            thread: Some(thread),
        }
    }

    /// What to do from now on.
    pub(crate) fn set(&self, mischief: Mischief) {
        self.plan.lock().unwrap().0 = mischief;
    }

    /// What was done so far.
    pub(crate) fn done(&self) -> Done {
        self.plan.lock().unwrap().1
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.wake().unwrap();
        let ended = self.thread.take().map(JoinHandle::join);
        if !thread::panicking() {
            ended.unwrap().unwrap();
        }
    }
}

/// A packet that others are to overtake.
struct HeldBack {
    packet: Vec<u8>,
    overtaking: usize,
    until: Instant,
}

fn relay(mut poll: Poll, wires: &[Wire; 2], plan: &Mutex<(Mischief, Done)>) {
    let mut events = Events::with_capacity(4);
    let mut buffer = vec![0; LONGEST];
    let mut held: [VecDeque<HeldBack>; 2] = Default::default();
    let mut dice = Dice(1);
    loop {
        let waiting = held.iter().any(|held| !held.is_empty());
        match poll.poll(&mut events, waiting.then_some(HELD)) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            polled => polled.unwrap(),
        }
        if events.iter().any(|event| event.token() == Token(wires.len())) {
            return;
        }
        for (from, held) in held.iter_mut().enumerate() {
            let to = &wires[1 - from];
            // Fails only when the lab is being removed.
            let send = |packet: &[u8]| drop(to.try_send(packet));
            while let Ok(length) = wires[from].try_recv(&mut buffer) {
                let packet = &buffer[..length];
                pass(packet, held, &mut dice, &mut plan.lock().unwrap(), send);
            }
            let now = Instant::now();
            while held.front().is_some_and(|first| first.until <= now) {
                held.pop_front().iter().for_each(|late| send(&late.packet));
            }
        }
    }
}

fn pass(
    packet: &[u8],
    held: &mut VecDeque<HeldBack>,
    dice: &mut Dice,
    (mischief, done): &mut (Mischief, Done),
    send: impl Fn(&[u8]),
) {
    let Some(inner) = inner_protocol(packet) else {
        return send(packet);
    };
    let counts = u64::from(inner == protocol::UDP);
    if dice.falls(mischief.lose) {
        done.lost += counts;
        return;
    }
    done.passed += counts;
    if dice.falls(mischief.hold_back) {
        done.held_back += counts;
        held.push_back(HeldBack {
            packet: packet.to_vec(),
            overtaking: OVERTAKING,
            until: Instant::now() + HELD,
        });
        return;
    }
    send(packet);
    if dice.falls(mischief.double) {
        done.doubled += counts;
        send(packet);
    }
    held.iter_mut().for_each(|late| late.overtaking -= 1);
    while held.front().is_some_and(|first| first.overtaking == 0) {
        held.pop_front().iter().for_each(|late| send(&late.packet));
    }
}

/// The protocol of the packet inside a tunnel datagram; `None`: it is none.
fn inner_protocol(packet: &[u8]) -> Option<u8> {
    let outer = Ipv4Packet::new_checked(packet).ok()?;
    if outer.protocol() != protocol::UDP {
        return None;
    }
    let datagram = UdpDatagram::new_checked(outer.payload()).ok()?;
    if datagram.dst_port() != PORT {
        return None;
    }
    match IpPacket::parse(datagram.payload()).ok()? {
        IpPacket::V4(inner) => Some(inner.protocol()),
        IpPacket::V6(inner) => Some(inner.next_header()),
    }
}

/// Numbers that look like chance and are the same in each run (xorshift64, Marsaglia 2003).
struct Dice(u64);

impl Dice {
    /// Whether one of so many of 1,000 chances has come true.
    fn falls(&mut self, of_thousand: u32) -> bool {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) % 1_000 < u64::from(of_thousand)
    }
}
