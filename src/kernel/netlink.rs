//! A blocking rtnetlink socket: requests one at a time, in batches, and dumps; and the messages in a datagram.

use std::{io, iter};

use netlink_packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkBuffer,
    NetlinkHeader, NetlinkMessage, NetlinkPayload, NlasIterator, Parseable,
};
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use tracing::debug;

/// Requests sent with one system call, so that all their answers fit the receive buffer: nobody reads while the kernel
/// handles them. A larger number gains nothing; the kernel's work on a request is many times that of a system call's share.
const BATCH: usize = 32;

/// Half of what the answers to a batch are charged to the receive buffer, because the kernel doubles the value set
/// (socket(7)). An answer is at most a page with 512 bytes of bookkeeping (NLMSG_GOODSIZE, `struct sk_buff`), so that
/// 4,096 bytes doubled are enough; the sum, 128 KiB, is below what any user may set (`net.core.rmem_max`).
const RECEIVE_BUFFER: usize = BATCH * 4_096;

/// The longest datagram: the kernel puts at most 32 KiB of a dump into one, unless a single entry is longer
/// (netlink_dump()); twice that for such an entry.
pub(super) const DATAGRAM: usize = 64 * 1024;

/// How often a dump that was disturbed by changes is begun anew. One of thousands of entries takes a few milliseconds:
/// whatever disturbs all of them in a tenth of a second has not come to rest, and the caller better waits for it.
const DUMPS: usize = 64;

/// What the kernel says to one request: the messages that it answers with, or why it refuses.
pub(super) type Answer = Result<Vec<Message>, Refusal>;

/// Why a request failed.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) error: io::Error,
    /// The kernel's own words, where it has some: "Nexthop has invalid gateway".
    pub(super) reason: Option<String>,
}

impl Refusal {
    /// The system's number of the error.
    pub(super) fn code(&self) -> Option<i32> {
        self.error.raw_os_error()
    }

    /// By the negative number of an NLMSG_ERROR or NLMSG_DONE and the attributes of its extended acknowledgement.
    fn of(code: i32, attributes: &[u8]) -> Self {
        /// `NLMSGERR_ATTR_MSG` (linux/netlink.h)
        const TEXT: u16 = 1;
        let text = NlasIterator::new(attributes)
            .filter_map(Result::ok)
            .find(|attribute| attribute.kind() == TEXT);
        Self {
            error: io::Error::from_raw_os_error(-code),
            reason: text.map(|text| String::from_utf8_lossy(text.value()).trim_end_matches('\0').to_owned()),
        }
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self { error, reason: None }
    }
}

/// Serves one caller at a time.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: Socket,
    /// Of the last request.
    sequence: u32,
    /// The socket's address: notifications of what was done through it bear it.
    port: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        let port = socket.bind_auto()?.port_number();
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_rx_buf_sz(RECEIVE_BUFFER as libc::c_int)?;
        // Nothing depends on these, and kernels before 4.20 do not know all of them: refusals without the request that they
        // are about, but with a reason in words; dumps filtered by the kernel, besides the callers' own filters.
        let _ = socket.set_cap_ack(true);
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_netlink_get_strict_chk(true);
        Ok(Self {
            socket,
            sequence: 0,
            port,
            buffer: Vec::with_capacity(DATAGRAM),
        })
    }

    pub(super) fn port(&self) -> u32 {
        self.port
    }

    /// Sends one request with `flags` (`NLM_F_REPLACE`, ..) and waits for the kernel's answer.
    pub(super) fn request(&mut self, message: Message, flags: u16) -> Answer {
        self.batch([(message, flags)])?.pop().unwrap_or_else(|| Ok(Vec::new()))
    }

    /// Sends any number of requests, and collects the answer to each, in order.
    ///
    /// # Errors
    /// When it is not known what the kernel did.
    pub(super) fn batch(&mut self, requests: impl IntoIterator<Item = (Message, u16)>) -> io::Result<Vec<Answer>> {
        let mut requests = requests.into_iter().peekable();
        let mut answers: Vec<Answer> = Vec::new();
        while requests.peek().is_some() {
            let done = answers.len();
            self.exchange(requests.by_ref().take(BATCH), |reply| match reply {
                Reply::Sent => answers.push(Ok(Vec::new())),
                Reply::Message(index, message) => {
                    if let Ok(messages) = &mut answers[done + index] {
                        messages.push(message);
                    }
                }
                Reply::Refused(index, error) => answers[done + index] = Err(error),
                Reply::Disturbed => {}
            })?;
        }
        Ok(answers)
    }

    /// Sends a request for all entries of a kind, as often as it takes to get a list that no change has cut through.
    ///
    /// # Errors
    /// `EAGAIN` when the changes do not end.
    pub(super) fn dump(&mut self, message: Message) -> Answer {
        for _ in 0..DUMPS {
            let (mut found, mut disturbed) = (Ok(Vec::new()), false);
            let end = self.exchange([(message.clone(), NLM_F_DUMP)], |reply| match (reply, &mut found) {
                (Reply::Message(_, message), Ok(list)) => list.push(message),
                (Reply::Refused(_, error), _) => found = Err(error),
                (Reply::Disturbed, _) => disturbed = true,
                _ => {}
            });
            match end.map_err(Refusal::from).and(found) {
                // ENOBUFS: the kernel had no memory for the next part. EBUSY: an earlier dump that broke off in this way is
                // not read to its end yet; each answer that is read brings it nearer.
                Err(refusal) if matches!(refusal.code(), Some(libc::ENOBUFS | libc::EBUSY)) => {}
                Ok(_) if disturbed => {}
                found => return found,
            }
        }
        Err(io::Error::from_raw_os_error(libc::EAGAIN).into())
    }

    /// Sends up to [`BATCH`] requests at once; tells `took` of each that it is sent, then what the kernel says to it.
    ///
    /// The kernel handles them in order and reports each refusal without being asked. Only the last one asks for an
    /// acknowledgement: when it comes, silence about the others means success (netlink_rcv_skb()).
    fn exchange(
        &mut self,
        requests: impl IntoIterator<Item = (Message, u16)>,
        mut took: impl FnMut(Reply),
    ) -> io::Result<()> {
        let before = self.sequence;
        let mut bytes = Vec::new();
        let mut last = 0;
        for (message, flags) in requests {
            self.sequence = self.sequence.wrapping_add(1);
            let mut request = NetlinkMessage::from(message);
            request.header.flags = NLM_F_REQUEST | flags;
            request.header.sequence_number = self.sequence;
            request.finalize();
            last = bytes.len();
            // Messages begin at multiples of 4 bytes (NLMSG_ALIGN).
            bytes.resize(last + request.buffer_len().next_multiple_of(4), 0);
            request.serialize(&mut bytes[last..]);
            took(Reply::Sent);
        }
        if bytes.is_empty() {
            return Ok(());
        }
        let mut header = NetlinkBuffer::new(&mut bytes[last..]);
        let flags = header.flags();
        // A dump ends with DONE and has no acknowledgement besides.
        if flags & NLM_F_DUMP != NLM_F_DUMP {
            header.set_flags(flags | NLM_F_ACK);
        }
        self.socket.send(&bytes, 0)?;

        // All is read before any of it is parsed: the sooner a list is read, the less often a change cuts through it.
        self.buffer.clear();
        loop {
            let start = self.buffer.len();
            receive(&self.socket, &mut self.buffer)?;
            let mut datagram = &self.buffer[start..];
            let last = self.sequence;
            if iter::from_fn(|| split(&mut datagram)).any(|(header, _)| is_end(&header, last)) {
                break;
            }
            self.buffer.resize(self.buffer.len().next_multiple_of(4), 0);
        }
        for Received { header, payload } in Messages(&self.buffer) {
            // The first is 0. Others are left over from a request that failed in the middle.
            let index = header.sequence_number.wrapping_sub(before).wrapping_sub(1) as usize;
            if index >= self.sequence.wrapping_sub(before) as usize {
                continue;
            }
            if header.flags & NLM_F_DUMP_INTR != 0 {
                took(Reply::Disturbed);
            }
            let (code, attributes) = match &payload {
                Some(NetlinkPayload::Error(error)) => (error.raw_code(), reason_of(&header, error)),
                Some(NetlinkPayload::Done(done)) => (done.code, done.extended_ack.as_slice()),
                _ => {
                    if let Some(NetlinkPayload::InnerMessage(message)) = payload {
                        took(Reply::Message(index, message));
                    }
                    continue;
                }
            };
            if code < 0 {
                took(Reply::Refused(index, Refusal::of(code, attributes)));
            }
        }
        Ok(())
    }
}

/// Whether this is the last message of the answer to the request of this number: an acknowledgement, a refusal or the end of
/// a dump.
fn is_end(header: &NetlinkHeader, sequence: u32) -> bool {
    let ends = [libc::NLMSG_ERROR, libc::NLMSG_DONE].contains(&i32::from(header.message_type));
    ends && header.sequence_number == sequence
}

/// The attributes of an NLMSG_ERROR that say more, if there are some: they follow the request's header, or the request
/// where the kernel could not be asked to leave it out.
fn reason_of<'a>(header: &NetlinkHeader, error: &'a ErrorMessage) -> &'a [u8] {
    // linux/netlink.h; in answers these bits mean other things than in requests.
    let (capped, attributes) = (header.flags & NLM_F_CAPPED != 0, header.flags & NLM_F_ACK_TLVS != 0);
    let request = NetlinkBuffer::new(error.header.as_slice());
    let start = match error.header.len() {
        _ if !attributes => return &[],
        0..REQUEST_HEADER => return &[],
        _ if capped => REQUEST_HEADER,
        _ => (request.length() as usize).next_multiple_of(4),
    };
    error.header.get(start..).unwrap_or_default()
}

/// `struct nlmsghdr`, bytes.
const REQUEST_HEADER: usize = 16;

enum Reply {
    /// One more request is on its way.
    Sent,
    /// Part of the answer to the request of this number in the batch.
    Message(usize, Message),
    /// The request of this number has failed.
    Refused(usize, Refusal),
    /// The list being dumped has changed meanwhile (`NLM_F_DUMP_INTR`).
    Disturbed,
}

/// Reads one datagram to the end of `buffer`.
pub(super) fn receive(socket: &Socket, buffer: &mut Vec<u8>) -> io::Result<()> {
    let start = buffer.len();
    buffer.reserve(DATAGRAM);
    // With MSG_TRUNC the kernel tells how long the datagram was, also beyond the buffer.
    let length = socket.recv(buffer, libc::MSG_TRUNC)?;
    if length > buffer.len() - start {
        let text = format!("a netlink datagram of {length} bytes is longer than {DATAGRAM}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    Ok(())
}

/// Takes the first message, header and all, off `messages`.
fn split<'a>(messages: &mut &'a [u8]) -> Option<(NetlinkHeader, &'a [u8])> {
    let header = NetlinkHeader::parse(&NetlinkBuffer::new_checked(*messages).ok()?).ok()?;
    let (message, _) = messages.split_at_checked(header.length as usize)?;
    // Messages begin at multiples of 4 bytes (NLMSG_ALIGN).
    *messages = &messages[message.len().next_multiple_of(4).min(messages.len())..];
    Some((header, message))
}

/// The messages of datagrams.
#[derive(Debug)]
pub(super) struct Messages<'a>(pub(super) &'a [u8]);

/// One message.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) header: NetlinkHeader,
    /// `None` for one of a form that we do not understand; so it is about nothing that we made.
    pub(super) payload: Option<NetlinkPayload<Message>>,
}

impl Iterator for Messages<'_> {
    type Item = Received;

    fn next(&mut self) -> Option<Received> {
        let (header, message) = split(&mut self.0)?;
        let payload = NetlinkMessage::deserialize(message)
            .inspect_err(|error| debug!("a netlink message is passed over: {error}"))
            .ok()
            .map(|message| message.payload);
        Some(Received { header, payload })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message with this payload; the length of the whole comes first.
    fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&(REQUEST_HEADER as u32 + payload.len() as u32).to_ne_bytes());
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&sequence.to_ne_bytes());
        bytes.extend_from_slice(&7u32.to_ne_bytes());
        bytes.extend_from_slice(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// The payload of an NLMSG_ERROR.
    fn refusal(code: i32, request: &[u8], attributes: &[u8]) -> Vec<u8> {
        [&code.to_ne_bytes(), request, attributes].concat()
    }

    const ERROR: u16 = libc::NLMSG_ERROR as u16;

    #[test]
    fn what_is_not_understood_is_passed_over() {
        let datagram = [
            // A link whose header is cut.
            message(libc::RTM_NEWLINK, 0, 1, &[0; 6]),
            message(ERROR, 0, 2, &refusal(0, &message(0, 0, 2, &[])[..REQUEST_HEADER], &[])),
            // Longer than what is left.
            vec![200, 0, 0, 0, 9, 9],
        ]
        .concat();
        let mut messages = Messages(&datagram);
        let cut = messages.next().unwrap();
        assert_eq!((cut.header.sequence_number, cut.header.port_number), (1, 7));
        assert!(cut.payload.is_none());
        let whole = messages.next().unwrap();
        assert!(matches!(whole.payload, Some(NetlinkPayload::Error(error)) if error.raw_code() == 0));
        assert!(messages.next().is_none());
        assert!(Messages(&[0; 16]).next().is_none());
    }

    #[test]
    fn the_kernels_reason_is_found() {
        // An offset (NLMSGERR_ATTR_OFFS), then the text; lengths with the header of 4 bytes.
        let mut attributes = vec![8, 0, 2, 0, 1, 0, 0, 0];
        attributes.extend_from_slice(&[11, 0, 1, 0]);
        attributes.extend_from_slice(b"No way\0\0");
        let request = message(libc::RTM_NEWROUTE, 0, 3, &[1, 2, 3, 4, 5]);
        let reason = |flags, request: &[u8]| {
            let datagram = message(ERROR, flags, 3, &refusal(-libc::EINVAL, request, &attributes));
            let Received { header, payload } = Messages(&datagram).next().unwrap();
            let Some(NetlinkPayload::Error(error)) = payload else {
                panic!("{payload:?}")
            };
            let refusal = Refusal::of(error.raw_code(), reason_of(&header, &error));
            assert_eq!(refusal.code(), Some(libc::EINVAL));
            refusal.reason
        };
        assert_eq!(
            reason(NLM_F_ACK_TLVS | NLM_F_CAPPED, &request[..REQUEST_HEADER]).unwrap(),
            "No way"
        );
        assert_eq!(reason(NLM_F_ACK_TLVS, &request).unwrap(), "No way");
        assert_eq!(reason(NLM_F_CAPPED, &request[..REQUEST_HEADER]), None);
        assert_eq!(reason(NLM_F_ACK_TLVS, &[1, 2, 3]), None);
    }
}
