//! Service 4: the list of live replicas.

use contract::Parity;
use serde_json::Value;
use tests::http::get;
use tests::{Pipeline, eventually};

/// The ids of a service's replicas, sorted.
fn ids(list: &Value, service: &str) -> Vec<String> {
    let replicas = list["replicas"].as_array().unwrap().iter();
    let of_service = replicas.filter(|replica| replica["service"] == service);
    of_service.map(|replica| replica["id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn every_replica_is_listed_while_it_lives() {
    let mut pipeline = Pipeline::new().await;
    let (_gateway, address) = pipeline.gateway().await;
    let [_even, mut doomed, _odd, _other_odd] = pipeline.generators().await;
    let _multipliers = [pipeline.multiplier(50).await, pipeline.multiplier(50).await];
    let list = async || {
        let answer = get(&address, "/replicas", &[]).await;
        (answer.status == 200)
            .then(|| answer.json())
            .unwrap_or(serde_json::json!({ "replicas": [] }))
    };
    let counts = async || {
        let list = list().await;
        ["even", "odd", "multiplier", "gateway"].map(|service| ids(&list, service).len())
    };
    eventually("all are listed", async || counts().await == [2, 2, 2, 1]).await;
    let shown = list().await;
    for replica in shown["replicas"].as_array().unwrap() {
        assert_eq!(replica["version"], env!("CARGO_PKG_VERSION"));
        assert!(replica["started"].as_str().unwrap().starts_with("20"));
        // The gateway counts the requests that came before it was ready as errors.
        assert!(replica["service"] == "gateway" || replica["errors"] == 0, "{replica}");
    }
    // The latest tick is from one of the multipliers, and changes.
    let mut slots = Vec::new();
    eventually("the latest tick changes", async || {
        let list = list().await;
        let tick = &list["latest_tick"];
        if tick.is_null() {
            return false;
        }
        let multiplier = tick["multiplier"].as_str().unwrap().to_owned();
        assert!(ids(&list, "multiplier").contains(&multiplier), "{list}");
        slots.push(tick["slot"].as_u64().unwrap());
        slots.last() > slots.first()
    })
    .await;
    doomed.kill();
    eventually("the killed one is gone", async || counts().await == [1, 2, 2, 1]).await;
    let _new = pipeline.generator(Parity::Even).await;
    eventually("the new one is there", async || counts().await == [2, 2, 2, 1]).await;
    // Without the broker the gateway serves the last list, with its age.
    pipeline.broker.kill();
    eventually("the list is old", async || {
        get(&address, "/replicas", &[]).await.header("age").is_some()
    })
    .await;
    assert_eq!(counts().await, [2, 2, 2, 1]);
    pipeline.broker.restart().await;
    eventually("all are back", async || {
        get(&address, "/replicas", &[]).await.header("age").is_none()
            && counts().await == [2, 2, 2, 1]
    })
    .await;
}

/// Foreign answers on the Services API neither stop the list nor grow it without limit.
#[tokio::test]
async fn foreign_answers_do_no_harm() {
    use futures::StreamExt;
    let pipeline = Pipeline::new().await;
    let (_gateway, address) = pipeline.gateway().await;
    let mut asked = pipeline.client.subscribe("$SRV.STATS").await.unwrap();
    let question = asked.next().await.unwrap();
    let reply = question.reply.unwrap();
    for n in 0..3000 {
        let payload = match n % 3 {
            0 => "nonsense".to_owned(),
            1 => r#"{"name":1}"#.to_owned(),
            _ => format!(
                r#"{{"name":"x","id":"{n}","version":"1.0.0","started":"2026-01-01T00:00:00Z"}}"#
            ),
        };
        pipeline.client.publish(reply.clone(), payload.into()).await.unwrap();
    }
    eventually("the foreign ones are listed", async || {
        let answer = get(&address, "/replicas", &[]).await;
        answer.status == 200 && {
            let listed = ids(&answer.json(), "x").len();
            assert!(listed <= 1000);
            listed > 500
        }
    })
    .await;
    eventually("and forgotten", async || {
        let list = get(&address, "/replicas", &[]).await.json();
        ids(&list, "x").is_empty() && ids(&list, "gateway").len() == 1
    })
    .await;
}
