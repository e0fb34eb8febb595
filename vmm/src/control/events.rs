//! Events for `ctl events`: what happens is offered to whoever listens, and nobody waits for them.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    time::{Duration, SystemTime},
};

use serde_json::{Value, json};

/// Events a listener may lag behind before it misses some.
const QUEUE: usize = 256;

/// Where events are published.
#[derive(Debug, Default)]
pub struct EventHub(Mutex<Vec<Listener>>);

#[derive(Debug)]
struct Listener {
    queue: SyncSender<Value>,
    lost: Arc<AtomicU64>,
}

/// Where one listener gets them.
#[derive(Debug)]
pub struct Subscription {
    queue: Receiver<Value>,
    lost: Arc<AtomicU64>,
}

/// What a [`Subscription`] has.
#[derive(Debug, PartialEq)]
pub enum Next {
    /// An event.
    Event(Value),
    /// So many events were missed.
    Lost(u64),
    /// Nothing happened for a while.
    Quiet,
    /// There will be no more.
    End,
}

impl EventHub {
    /// Tells the listeners that something named `kind` happened now; `details` is an object.
    pub fn publish(&self, kind: &str, details: Value) {
        let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let mut event = json!({ "event": kind, "time": time.as_secs_f64() });
        if let (Some(event), Value::Object(mut details)) = (event.as_object_mut(), details) {
            event.append(&mut details);
        }
        let mut listeners = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.retain(|listener| match listener.queue.try_send(event.clone()) {
            Ok(()) => true,
            Err(TrySendError::Full(_)) => {
                listener.lost.fetch_add(1, Ordering::Relaxed);
                true
            }
            Err(TrySendError::Disconnected(_)) => false,
        });
    }

    /// From now on.
    pub fn subscribe(&self) -> Subscription {
        let (sender, queue) = sync_channel(QUEUE);
        let lost = Arc::<AtomicU64>::default();
        let listener = Listener { queue: sender, lost: lost.clone() };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(listener);
        Subscription { queue, lost }
    }
}

impl Subscription {
    /// Waits for what is next, up to `pause`.
    pub fn next(&self, pause: Duration) -> Next {
        match self.queue.recv_timeout(pause) {
            Ok(event) => Next::Event(event),
            // What was missed came after what was in the queue.
            Err(error) => match (self.lost.swap(0, Ordering::Relaxed), error) {
                (0, RecvTimeoutError::Timeout) => Next::Quiet,
                (0, RecvTimeoutError::Disconnected) => Next::End,
                (lost, _) => Next::Lost(lost),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_hear_what_comes_later_and_are_told_what_they_missed() {
        let events = EventHub::default();
        events.publish("early", json!({}));
        let listener = events.subscribe();
        events.publish("door", json!({ "open": true }));
        let Next::Event(event) = listener.next(Duration::ZERO) else { panic!("nothing") };
        assert_eq!((&event["event"], &event["open"]), (&json!("door"), &json!(true)));
        assert!(event["time"].as_f64().unwrap() > 1e9);
        for i in 0..QUEUE + 5 {
            events.publish("tick", json!({ "i": i }));
        }
        for _ in 0..QUEUE {
            assert!(matches!(listener.next(Duration::ZERO), Next::Event(_)));
        }
        assert_eq!(listener.next(Duration::ZERO), Next::Lost(5));
        assert_eq!(listener.next(Duration::ZERO), Next::Quiet);
        let gone = events.subscribe();
        drop(gone);
        events.publish("tick", json!({}));
        assert_eq!(events.0.lock().unwrap().len(), 1);
        drop(events);
        assert!(matches!(listener.next(Duration::ZERO), Next::Event(_)));
        assert_eq!(listener.next(Duration::ZERO), Next::End);
    }
}
