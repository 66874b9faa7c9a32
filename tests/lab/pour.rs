//! Writing into etcd by the thousand, from the switch's namespace.

use super::{etcd::EtcdServer, inside};
use etcd_client::{Client, Txn, TxnOp};
use flannel::lab::Lab;

/// Where the network's keys are.
pub(crate) const PREFIX: &str = "/coreos.com/network";

/// How many operations a transaction may have (etcd's `--max-txn-ops`), and how many bytes we put into one: etcd takes 1.5 MB.
const OPERATIONS: usize = 128;
const BYTES: usize = 1_000_000;

/// A runtime for one thread's calls.
pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// Writes all of these, as many to a transaction as etcd takes. Keys need be no text.
pub(crate) fn pour<K: Into<Vec<u8>>, V: Into<Vec<u8>>>(
    lab: &Lab,
    server: &EtcdServer,
    records: impl Iterator<Item = (K, V)> + Send,
) {
    inside(lab.switch(), || {
        runtime().block_on(async {
            let mut client = Client::connect([server.url()], None).await.unwrap();
            let (mut batch, mut bytes) = (Vec::new(), 0);
            for (key, value) in records {
                let (key, value) = (key.into(), value.into());
                let length = key.len() + value.len();
                if !batch.is_empty() && (batch.len() == OPERATIONS || bytes + length > BYTES) {
                    let txn = Txn::new().and_then(std::mem::take(&mut batch));
                    client.txn(txn).await.unwrap();
                    bytes = 0;
                }
                bytes += length;
                batch.push(TxnOp::put(key, value, None));
            }
            client.txn(Txn::new().and_then(batch)).await.unwrap();
        });
    });
}
