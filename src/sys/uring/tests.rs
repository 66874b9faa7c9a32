//! With sockets in the place of a device: what keeps messages apart is to io_uring as good as a TUN queue.

use std::{
    fs,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::unix::net::{UnixDatagram, UnixStream},
    panic::{self, AssertUnwindSafe},
    thread,
};

use super::{pool::SLOTS, *};
use crate::sys::udp::{self, Message, SendBatch};

const TARGETS: Targets = Targets {
    packets: 64 << 10,
    datagrams: 64 << 10,
};

/// More than any of this takes, so that what never comes fails the test.
const PATIENCE: Option<Duration> = Some(Duration::from_secs(20));

/// A ring on one end of a pair and on a socket, with the other end and another socket.
struct Surroundings {
    ring: Ring<UnixDatagram, UdpSocket>,
    device: UnixDatagram,
    address: SocketAddr,
    peer: UdpSocket,
}

fn socket(address: &str) -> UdpSocket {
    udp::bind_group(address.parse().unwrap(), 1).unwrap().remove(0)
}

fn surroundings_at(address: &str, header: usize) -> Surroundings {
    let (queue, device) = UnixDatagram::pair().unwrap();
    let socket_of_ring = socket(address);
    udp::enable_gro(&socket_of_ring).unwrap();
    Surroundings {
        address: socket_of_ring.local_addr().unwrap(),
        ring: Ring::new(vec![queue], header, socket_of_ring, TARGETS).unwrap(),
        device,
        peer: socket(address),
    }
}

fn surroundings() -> Surroundings {
    surroundings_at("127.0.0.1:0", 0)
}

/// Whether there is no io_uring to test here, which is said: Debian 12 has Linux 6.1, and containers forbid it.
fn skipped() -> bool {
    let refused = probe().err();
    refused.inspect(|reason| eprintln!("skipped: {reason}")).is_some()
}

/// A message: what it holds, and the length of its datagrams.
type Taken = (Vec<u8>, usize);

impl Surroundings {
    /// Waits for messages and takes them, at most `most` at a time, until there are `count`.
    fn receive(&mut self, count: usize, most: usize) -> Vec<Taken> {
        let mut taken = Vec::new();
        while taken.len() < count {
            let arrivals = self.ring.wait(PATIENCE).unwrap();
            assert_ne!(arrivals, Arrivals::default(), "after {} messages", taken.len());
            let datagrams = self.ring.sources().1;
            while let Ok(batch) = datagrams.recv(most) {
                assert!(batch <= most);
                for index in 0..batch {
                    let message = datagrams.message(index);
                    assert_eq!(message.from, self.address.ip());
                    taken.push((datagrams.arena()[message.bytes].to_vec(), message.segment));
                }
            }
        }
        taken
    }

    /// Waits for packets and takes them, with what is in front, until there are `count`.
    fn read(&mut self, count: usize) -> Vec<Vec<u8>> {
        let mut taken = Vec::new();
        while taken.len() < count {
            self.ring.wait(PATIENCE).unwrap();
            let packets = self.ring.sources().0;
            while let Ok((packet, _)) = packets.recv() {
                taken.push(packets.arena()[packet].to_vec());
            }
        }
        taken
    }
}

fn numbered(count: u32) -> impl Iterator<Item = Vec<u8>> {
    (0..count).map(|number| number.to_be_bytes().repeat(1 + number as usize % 300))
}

#[test]
fn a_kernel_that_is_new_enough_has_all_that_is_needed() {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|number| number.trim().parse::<u32>().ok());
    let version = (numbers.next().unwrap(), numbers.next().unwrap());
    match probe() {
        Ok(()) | Err(Refused::Absent | Refused::SwitchedOff(_) | Refused::Forbidden) => {}
        Err(refused) => assert!(version < (6, 7), "Linux {release}: {refused}"),
    }
}

#[test]
fn errors_at_the_start_are_told_apart() {
    let why = |errno| probe::why(io::Error::from_raw_os_error(errno));
    assert!(matches!(why(libc::ENOSYS), Refused::Absent));
    assert!(matches!(why(libc::EINVAL), Refused::Old));
    assert!(matches!(why(libc::EPERM), Refused::Forbidden | Refused::SwitchedOff(_)));
    assert!(why(libc::EMFILE).to_string().contains("open files"));
}

#[test]
fn many_more_datagrams_than_buffers_arrive_whole_and_in_order() {
    if skipped() {
        return;
    }
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let mut around = surroundings_at(address, 0);
        for most in [64, 5, 1] {
            for datagram in numbered(1_000) {
                around.peer.send_to(&datagram, around.address).unwrap();
            }
            let expected: Vec<Taken> = numbered(1_000)
                .map(|datagram| (datagram.clone(), datagram.len()))
                .collect();
            assert_eq!(around.receive(1_000, most), expected);
        }
    }
}

#[test]
fn the_longest_and_the_shortest_datagram_arrive_whole() {
    if skipped() {
        return;
    }
    let mut around = surroundings();
    let longest: Vec<u8> = (0..65_507u32).map(|i| (i % 251) as u8).collect();
    // More than there are buffers, so that each kind comes into each buffer.
    for _ in 0..2 * SLOTS {
        for datagram in [&longest[..], b""] {
            around.peer.send_to(datagram, around.address).unwrap();
        }
        let taken = around.receive(2, 64);
        assert!(taken == [(longest.clone(), longest.len()), (vec![], 0)]);
    }
}

#[test]
fn merged_datagrams_are_told_by_their_length() {
    if skipped() {
        return;
    }
    let mut around = surroundings();
    let payload: Vec<u8> = (0..3_500u32).map(|i| i as u8).collect();
    let segmented = Message {
        to: around.address,
        slices: 1,
        segment: Some(1_000),
    };
    let sent = SendBatch::new().send(&around.peer, &[segmented], std::iter::once(&payload[..]));
    assert_eq!(sent.unwrap(), 1);
    assert_eq!(around.receive(1, 64), [(payload, 1_000)]);
}

#[test]
fn packets_come_in_order_with_what_is_in_front_of_them() {
    if skipped() {
        return;
    }
    let mut around = surroundings_at("127.0.0.1:0", 10);
    let packets: Vec<_> = (1..200u32).map(|number| number.to_be_bytes().repeat(64)).collect();
    let device = around.device.try_clone().unwrap();
    let sent = packets.clone();
    // The pair holds only some of them.
    let sender = thread::spawn(move || {
        sent.iter()
            .for_each(|packet| assert_eq!(device.send(packet).unwrap(), packet.len()))
    });
    assert_eq!(around.read(packets.len()), packets);
    sender.join().unwrap();
    let longest = vec![7; 10 + 65_535];
    around.device.send(&longest).unwrap();
    assert!(around.read(1) == [longest]);
}

#[test]
fn packets_begin_a_cache_line_behind_what_is_in_front() {
    if skipped() {
        return;
    }
    for header in [0, 10] {
        let mut around = surroundings_at("127.0.0.1:0", header);
        around.device.send(&[1; 100]).unwrap();
        around.peer.send_to(&[2; 100], around.address).unwrap();
        around.read(1);
        around.device.send(&[1; 100]).unwrap();
        around.ring.wait(PATIENCE).unwrap();
        let packets = around.ring.sources().0;
        let (packet, _) = packets.recv().unwrap();
        assert_eq!(packets.arena()[packet.start + header..].as_ptr() as usize % 64, 0);
    }
}

#[test]
fn what_was_taken_stays_until_the_next_wait_while_more_comes() {
    if skipped() {
        return;
    }
    let mut around = surroundings();
    let send = |value: u8| {
        for _ in 0..SLOTS {
            around.peer.send_to(&[value; 1_000], around.address).unwrap();
        }
    };
    send(1);
    around.ring.wait(PATIENCE).unwrap();
    let datagrams = around.ring.sources().1;
    let count = datagrams.recv(SLOTS).unwrap();
    send(2);
    assert_eq!(datagrams.recv(SLOTS).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    assert_eq!(count, around.ring.sources().1.source.taken());
    send(3);
    let expected = [1, 2, 3].map(|value| vec![(vec![value; 1_000], 1_000); SLOTS]).concat();
    assert_eq!(around.receive(3 * SLOTS - count, SLOTS), expected[count..]);
}

#[test]
fn without_anything_new_a_look_costs_no_time_and_brings_nothing() {
    if skipped() {
        return;
    }
    let mut around = surroundings();
    for _ in 0..3 {
        assert_eq!(around.ring.wait(Some(Duration::ZERO)).unwrap(), Arrivals::default());
    }
    assert_eq!(
        around.ring.wait(Some(Duration::from_millis(5))).unwrap(),
        Arrivals::default()
    );
    // And misses nothing.
    around.peer.send_to(b"x", around.address).unwrap();
    let arrivals = around.ring.wait(Some(Duration::ZERO)).unwrap();
    assert!(arrivals.datagrams && !arrivals.packets && !arrivals.bell);
}

#[test]
fn the_bell_wakes_whoever_waits_each_time() {
    if skipped() {
        return;
    }
    let mut around = surroundings();
    for _ in 0..3 {
        let bell = around.ring.bell();
        let ringer = thread::spawn(move || bell().unwrap());
        let arrivals = around.ring.wait(None).unwrap();
        assert!(arrivals.bell && !arrivals.packets && !arrivals.datagrams);
        ringer.join().unwrap();
    }
}

#[test]
fn the_end_of_a_queue_is_told_once_what_came_before_is_taken() {
    if skipped() {
        return;
    }
    let (queue, device) = UnixStream::pair().unwrap();
    let mut ring = Ring::new(vec![queue], 0, socket("127.0.0.1:0"), TARGETS).unwrap();
    (&device).write_all(b"the last").unwrap();
    drop(device);
    ring.wait(PATIENCE).unwrap();
    let packets = ring.sources().0;
    let (last, _) = packets.recv().unwrap();
    assert_eq!(packets.arena()[last], *b"the last");
    assert_eq!(packets.recv().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn packets_come_from_two_queues_and_go_by_either() {
    if skipped() {
        return;
    }
    let (queues, devices): (Vec<_>, Vec<_>) = [(); 2].map(|()| UnixDatagram::pair().unwrap()).into_iter().unzip();
    let mut ring = Ring::new(queues, 0, socket("127.0.0.1:0"), TARGETS).unwrap();
    // What has come from each queue, in order.
    let mut receive = |count: usize| {
        let mut came = [Vec::new(), Vec::new()];
        while came.iter().map(Vec::len).sum::<usize>() < count {
            assert!(ring.wait(PATIENCE).unwrap().packets);
            let packets = ring.sources().0;
            while let Ok((range, queue)) = packets.recv() {
                came[queue].push(packets.arena()[range].to_vec());
            }
        }
        came
    };
    // More than there are buffers, so that the kernel ends the requests.
    for round in 0..3 * SLOTS {
        let sent = [b"a", b"b"].map(|name| [&name[..], &round.to_be_bytes()].concat());
        for (device, packet) in devices.iter().zip(&sent) {
            device.send(packet).unwrap();
        }
        assert_eq!(receive(2), sent.map(|packet| vec![packet]));
    }
    let mut writer = Writer::new(devices).unwrap();
    let mut batch = writer.batch();
    for (queue, packet) in [(1, b"x"), (0, b"y"), (1, b"z")] {
        batch.add(queue, std::iter::once(&packet[..]));
    }
    assert_eq!(batch.write().filter(Result::is_ok).count(), 3);
    let [first, second] = receive(3);
    assert_eq!((first.concat(), second.concat()), (b"y".to_vec(), b"xz".to_vec()));
}

#[test]
fn a_ring_takes_no_requests_but_those_that_it_is_for() {
    if skipped() {
        return;
    }
    let mut ring = surroundings().ring;
    let other = 99;
    assert!(ring.push(opcode::Nop::new().build().user_data(other)));
    ring.uring.submit().unwrap();
    let result = ring
        .uring
        .completion()
        .find(|completion| completion.user_data() == other);
    assert_eq!(result.unwrap().result(), -libc::EACCES);
    let registered = ring.uring.submitter().register_probe(&mut io_uring::Probe::new());
    assert_eq!(registered.unwrap_err().raw_os_error(), Some(libc::EACCES));
}

#[test]
fn a_ring_that_ends_lets_go_of_its_files() {
    if skipped() {
        return;
    }
    let mut around = surroundings();
    around.ring.wait(Some(Duration::ZERO)).unwrap();
    assert!(around.ring.is_armed());
    let Surroundings {
        ring, device, address, ..
    } = around;
    drop(ring);
    assert!(device.send(b"anyone?").is_err());
    UdpSocket::bind(address).unwrap();
}

#[test]
fn a_ring_that_is_left_has_given_out_what_it_took_and_leaves_the_rest_where_it_was() {
    if skipped() {
        return;
    }
    // The requests have taken none, some, or all of it when they are ended.
    for looks in 0..3 {
        let mut around = surroundings();
        let behind = around.ring.socket.try_clone().unwrap();
        around.ring.wait(Some(Duration::ZERO)).unwrap();
        for datagram in numbered(100) {
            around.peer.send_to(&datagram, around.address).unwrap();
        }
        for _ in 0..looks {
            around.ring.wait(Some(Duration::ZERO)).unwrap();
        }
        let mut all = Vec::new();
        while around.ring.leave().unwrap().datagrams {
            let datagrams = around.ring.sources().1;
            for index in 0..datagrams.recv(7).unwrap() {
                let message = datagrams.message(index);
                all.push(datagrams.arena()[message.bytes].to_vec());
            }
        }
        drop(around.ring);
        let mut buffer = [0; 2_048];
        while let Ok(length) = behind.recv(&mut buffer) {
            all.push(buffer[..length].to_vec());
        }
        assert_eq!(all, numbered(100).collect::<Vec<_>>(), "after {looks} looks");
    }
}

#[test]
fn a_source_that_was_exchanged_is_never_waited_for() {
    if skipped() {
        return;
    }
    let (mut one, mut other) = (surroundings(), surroundings());
    std::mem::swap(one.ring.sources().0, other.ring.sources().0);
    let waited = panic::catch_unwind(AssertUnwindSafe(|| one.ring.wait(Some(Duration::ZERO))));
    let panicked = waited.unwrap_err();
    let message = panicked.downcast_ref::<String>().map(String::as_str);
    let message = message.or(panicked.downcast_ref::<&str>().copied());
    assert!(
        message.is_some_and(|message| message.contains("a ring's sources are its own")),
        "{message:?}"
    );
}

#[test]
fn writes_keep_their_order_and_parts() {
    if skipped() {
        return;
    }
    let (device, far) = UnixStream::pair().unwrap();
    let mut writer = Writer::new(vec![device]).unwrap();
    let payload: Vec<u8> = (0..200).collect();
    for count in [1, 2, MOST_WRITES] {
        let mut batch = writer.batch();
        for number in 0..count {
            // From one part to more than the kernel keeps on its stack (8).
            let parts = payload.chunks(1 + number * 7);
            batch.add(0, parts);
        }
        assert_eq!(batch.write().filter(Result::is_ok).count(), count);
        let mut received = vec![0; count * payload.len()];
        io::Read::read_exact(&mut &far, &mut received).unwrap();
        assert_eq!(received, payload.repeat(count));
    }
    assert_eq!(writer.batch().write().count(), 0);
}

#[test]
fn a_device_that_is_full_refuses_the_rest_of_a_batch_at_once() {
    if skipped() {
        return;
    }
    let (device, far) = UnixDatagram::pair().unwrap();
    let mut writer = Writer::new(vec![device]).unwrap();
    // 2 MiB in all, ten times what such a socket holds.
    let payload = [9; (32 << 10) + MOST_WRITES];
    let mut batch = writer.batch();
    for number in 0..MOST_WRITES {
        batch.add(0, [&[7; 3][..], &payload[number..]].into_iter());
    }
    let results: Vec<_> = batch.write().collect();
    let taken = results.iter().position(Result::is_err).unwrap();
    assert!(taken > 0);
    for result in &results[taken..] {
        assert_eq!(result.as_ref().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
    let mut packet = [0; 40 << 10];
    for number in 0..taken {
        assert_eq!(far.recv(&mut packet).unwrap(), 3 + payload.len() - number);
    }
    far.set_nonblocking(true).unwrap();
    assert!(far.recv(&mut packet).is_err());
}

#[test]
fn the_sender_is_known_in_both_families() {
    if skipped() {
        return;
    }
    for (address, ip) in [
        ("127.0.0.1:0", [127, 0, 0, 1].into()),
        ("[::1]:0", IpAddr::V6(std::net::Ipv6Addr::LOCALHOST)),
    ] {
        let mut around = surroundings_at(address, 0);
        around.peer.send_to(b"x", around.address).unwrap();
        around.ring.wait(PATIENCE).unwrap();
        let datagrams = around.ring.sources().1;
        assert_eq!(datagrams.recv(1).unwrap(), 1);
        assert_eq!(datagrams.message(0).from, ip);
    }
}
