//! System calls: the only module of the crate that may use `unsafe`.
//!
//! [`tun`] opens TUN queues, [`udp`] binds the tunnel's sockets and moves batches of datagrams with one call (`recvmmsg(2)`,
//! `sendmmsg(2)`), [`ethtool`] switches a device's offloads, [`uring`] receives and writes through io_uring, [`poll`] waits for
//! files, [`raw`] sends whole IP packets from this host, [`rights`] gives descriptors to other processes and takes theirs,
//! [`simd`] adds up words with wide vectors, [`boot`] tells how long the machine has run, [`priority`] says which threads go first;
//! [`capabilities`], [`seccomp`], [`access`] and [`arguments`] are what the sandbox is made of.
//! Everything here is mechanism; what to do with a packet is decided in [`crate::engine`].

#![allow(unsafe_code)]

pub mod access;
pub mod arguments;
pub mod boot;
pub mod capabilities;
pub mod ethtool;
pub mod poll;
pub mod priority;
pub mod raw;
pub mod rights;
pub mod seccomp;
pub mod simd;
pub mod tun;
pub mod udp;
pub mod uring;
