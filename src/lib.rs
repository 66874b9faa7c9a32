//! flannel: an overlay network for containers. Every host runs `flanneld`, leases a subnet, and carries packets between its
//! containers and those of all other hosts.
//!
//! The layers, each of which uses only those below it:
//!
//! | module | what lives there |
//! | --- | --- |
//! | [`cli`] | the command line, and a file for each subcommand |
//! | [`lab`] | hosts and containers as network namespaces, for the demo and the tests |
//! | [`daemon`] | the run: wires the rest together, and takes it down in order |
//! | [`doctor`] | what is wrong on a host, and what to do about it |
//! | [`handover`] | one daemon goes on in the place of another |
//! | [`supervisor`] | what runs the daemon: told how it is, keeps its descriptors |
//! | [`backend`] | the desired peers become state: [`backend::udp`], [`backend::vxlan`], [`backend::host_gw`] |
//! | [`rules`] | masquerade and forward rules, by iptables or nftables |
//! | [`lease`] | choosing, taking, keeping and watching subnets |
//! | [`registry`] | where configuration and leases are kept: etcd, a directory, memory |
//! | [`network`], [`subnet_file`] | the network's configuration; what Docker reads |
//! | [`engine`] | the packet engine: workers between TUN queues and UDP sockets |
//! | [`route_table`] | destination to peer, immutable, published without a lock |
//! | [`offload`] | superpackets into packets of the MTU and back; pure |
//! | [`packet`] | protocols as views over bytes; pure |
//! | [`kernel`] | links, addresses, routes, neighbours and forwarding entries over netlink |
//! | [`observe`] | logs and health |
//! | [`sandbox`] | what the daemon gives up: capabilities, system calls |
//! | [`sys`] | system calls; the only `unsafe` code |
//!
//! Two worlds meet at one narrow door. The control plane is asynchronous and runs on one thread, which steps back
//! behind the others; the data plane is plain threads that never log, allocate or lock per packet and never wait for the control
//! plane. The door is the route table
//! ([`route_table::Routes`]), a channel of commands for each worker, and counters.

#![deny(unsafe_code)]

pub mod backend;
pub mod cli;
pub mod daemon;
pub mod doctor;
pub mod engine;
mod files;
pub mod handover;
mod json;
pub mod kernel;
pub mod lab;
pub mod lease;
pub mod network;
pub mod observe;
pub mod offload;
pub mod packet;
pub mod registry;
pub mod route_table;
pub mod rules;
pub mod sandbox;
pub mod subnet_file;
pub mod supervisor;
pub mod sys;
