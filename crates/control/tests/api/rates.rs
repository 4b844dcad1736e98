//! Request rates: whom they count, whom they let through, and what a refusal says.

use belljar_control::{Config, Rate, Rates};

use crate::support::client::{Answer, Client};
use crate::support::{Rig, config};

fn rates(per_team: Option<&str>, per_address: Option<&str>) -> Config {
    let read = |text: &str| text.parse::<Rate>().expect("a rate");
    Config {
        rates: Rates { per_team: per_team.map(read), per_address: per_address.map(read) },
        ..config()
    }
}

#[track_caller]
fn assert_refused(answer: &Answer, whose: &str) {
    answer.assert_error(429, whose);
    assert_eq!(answer.headers["should-retry"], "true");
    let wait = answer.headers["retry-after"].to_str().expect("text");
    let seconds: u32 = wait.parse().expect("whole seconds");
    assert!((1..=1200).contains(&seconds), "{seconds}");
}

#[tokio::test]
async fn a_team_that_asks_too_often_is_told_when_to_come_back() {
    let rig = Rig::start_with(rates(Some("3/3600s"), None)).await;
    let client = &rig.control.client;
    for _ in 0..3 {
        assert_eq!(client.get("/v2/sandboxes").await.status, 200);
    }
    assert_refused(&client.get("/v2/sandboxes").await, "this team may send 3/3600s");
    assert_refused(&client.post("/sandboxes", "{}").await, "this team");
    // Nobody's requests count for nobody.
    let stranger = Client::new(rig.control.address, "e2b_00");
    for _ in 0..5 {
        assert_eq!(stranger.get("/v2/sandboxes").await.status, 401);
    }
    assert_eq!(client.get("/health").await.status, 200);
    rig.stop().await;
}

#[tokio::test]
async fn all_keys_of_a_team_count_together_and_teams_apart() {
    let rig = Rig::start_with(rates(Some("4/3600s"), None)).await;
    let store = &rig.control.store;
    let keys = [belljar_control::ApiKey::random(), belljar_control::ApiKey::random()];
    let own = store.ensure_team("default").await.expect("the team");
    let other = store.ensure_team("other").await.expect("a team");
    store.add_key(&own.id, &keys[0]).await.expect("a key");
    store.add_key(&other.id, &keys[1]).await.expect("a key");
    let second = Client::new(rig.control.address, &keys[0].expose());
    let others = Client::new(rig.control.address, &keys[1].expose());
    for _ in 0..2 {
        assert_eq!(rig.control.client.get("/sandboxes").await.status, 200);
        assert_eq!(second.get("/sandboxes").await.status, 200);
    }
    assert_refused(&second.get("/sandboxes").await, "this team");
    assert_refused(&rig.control.client.get("/sandboxes").await, "this team");
    assert_eq!(others.get("/sandboxes").await.status, 200);
    rig.stop().await;
}

#[tokio::test]
async fn an_address_is_held_back_before_its_keys_are_looked_at() {
    let rig = Rig::start_with(rates(None, Some("5/3600s"))).await;
    let stranger = Client::new(rig.control.address, "nonsense");
    for path in ["/v2/sandboxes", "/sandboxes/x", "/no/such/route", "/templates", "/"] {
        assert_ne!(stranger.get(path).await.status, 429, "{path}");
    }
    for path in ["/v2/sandboxes", "/no/such/route"] {
        assert_refused(&stranger.get(path).await, "this address may send 5/3600s");
    }
    // The key is good, the address is not better for it.
    assert_refused(&rig.control.client.get("/v2/sandboxes").await, "this address");
    // Load balancers must not take the server out because of somebody's flood.
    assert_eq!(rig.control.client.get("/health").await.status, 200);
    rig.stop().await;
}

#[tokio::test]
async fn the_default_rates_are_those_of_the_contract() {
    let rates = Rates::default();
    assert_eq!(rates.per_team, Rate::new(20_000, 30));
    assert_eq!(rates.per_address, Rate::new(40_000, 30));
}
