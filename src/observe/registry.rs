//! A registry that is watched over: how it answers is written on the [`Board`].

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;

use super::board::Board;
use crate::registry::{Error, Event, Record, Registry, Revision, TtlId, Watch};

/// Passes everything on.
#[derive(Debug)]
pub struct Observed {
    inner: Arc<dyn Registry>,
    board: Board,
}

impl Observed {
    /// `inner`, watched over.
    pub fn new(inner: Arc<dyn Registry>, board: Board) -> Self {
        Self { inner, board }
    }

    async fn timed<T>(
        &self,
        operation: &'static str,
        asked: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let begun = Instant::now();
        let answer = asked.await;
        self.board
            .asked(operation, begun.elapsed(), answer.as_ref().err().map(Error::to_string));
        answer
    }
}

#[async_trait]
impl Registry for Observed {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn full_key(&self, key: &str) -> String {
        self.inner.full_key(key)
    }

    async fn get(&self, key: &str) -> Result<Option<Record>, Error> {
        self.timed("get", self.inner.get(key)).await
    }

    async fn list(&self, start: &str) -> Result<Vec<Record>, Error> {
        self.timed("list", self.inner.list(start)).await
    }

    async fn watch(&self, start: &str) -> Result<(Vec<Record>, Box<dyn Watch>), Error> {
        let (records, inner) = self.timed("watch", self.inner.watch(start)).await?;
        let board = self.board.clone();
        Ok((records, Box::new(ObservedWatch { inner, board })))
    }

    async fn create(&self, key: &str, value: &[u8], ttl: Option<Duration>) -> Result<Option<Record>, Error> {
        self.timed("create", self.inner.create(key, value, ttl)).await
    }

    async fn replace(&self, record: &Record, value: &[u8]) -> Result<Option<Record>, Error> {
        self.timed("replace", self.inner.replace(record, value)).await
    }

    async fn delete(&self, record: &Record) -> Result<bool, Error> {
        self.timed("delete", self.inner.delete(record)).await
    }

    async fn put(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        self.timed("put", self.inner.put(key, value)).await
    }

    async fn refresh(&self, ttl: TtlId) -> Result<Option<Duration>, Error> {
        self.timed("refresh", self.inner.refresh(ttl)).await
    }

    async fn time_left(&self, ttl: TtlId) -> Result<Option<Duration>, Error> {
        self.timed("time_left", self.inner.time_left(ttl)).await
    }

    async fn similar_configs(&self) -> Vec<String> {
        self.inner.similar_configs().await
    }
}

struct ObservedWatch {
    inner: Box<dyn Watch>,
    board: Board,
}

#[async_trait]
impl Watch for ObservedWatch {
    fn begun_at(&self) -> Revision {
        self.inner.begun_at()
    }

    async fn next(&mut self) -> Result<Vec<Event>, Error> {
        let events = self.inner.next().await;
        self.board.told(events.as_ref().err().map(Error::to_string));
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::memory::MemoryRegistry;

    #[tokio::test]
    async fn what_is_asked_and_told_stands_on_the_board() {
        let memory = MemoryRegistry::new();
        let board = Board::new(memory.describe());
        let registry = Observed::new(Arc::new(memory.clone()), board.clone());
        assert!(!board.status().registry.connected);

        let (_, mut watch) = registry.watch("subnets/").await.unwrap();
        registry.put("subnets/10.5.1.0-24", b"x").await.unwrap();
        let status = board.status().registry;
        assert!(status.connected && status.seconds_since_answer.is_some());
        assert_eq!(status.seconds_since_event, None);
        assert_eq!(
            (status.requests["put"].answered, status.requests["watch"].answered),
            (1, 1)
        );

        watch.next().await.unwrap();
        assert!(board.status().registry.seconds_since_event.is_some());
    }

    #[test]
    fn a_request_without_an_answer_is_trouble_until_the_next_answer() {
        let board = Board::new("a test".to_owned());
        board.asked("get", Duration::from_millis(1500), Some("timed out".to_owned()));
        let status = board.status().registry;
        assert!(!status.connected);
        assert_eq!(status.trouble.as_deref(), Some("timed out"));
        assert_eq!(
            (status.requests["get"].failed, status.requests["get"].seconds),
            (1, 1.5)
        );
        board.asked("get", Duration::ZERO, None);
        assert!(board.status().registry.connected);
    }
}
