//! Access tokens and the published port, each switched on with one variable.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::{EncodingKey, Header};
use serde_json::json;
use tests::cluster::{HTTP, compose, compose_with, in_time};
use tests::http::{get, try_get};
use tests::repository;

use crate::Cluster;

/// Where the test writes its secret.
const FILE: &str = "secrets/test";
const SECRET: &[u8] = b"0123456789abcdef0123456789abcdef";

pub async fn the_gateways_can_ask_for_a_token(cluster: Cluster) {
    let file = repository().join(FILE);
    fs::write(&file, SECRET).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    let up = ["up", "--detach", "--no-deps", "gateway"];
    compose_with(&[("EVENODD_JWT_SECRET", FILE)], &up);
    in_time("a token is needed", async || answers(401).await).await;
    let in_an_hour = SystemTime::now() + Duration::from_hours(1);
    let claims = json!({ "exp": in_an_hour.duration_since(UNIX_EPOCH).unwrap().as_secs() });
    let key = EncodingKey::from_secret(SECRET);
    let token = jsonwebtoken::encode(&Header::default(), &claims, &key).unwrap();
    let header = format!("Authorization: Bearer {token}");
    in_time("the token is accepted", async || {
        get(HTTP, "/numbers", &[&header]).await.status == 200
    })
    .await;
    // Without the variable, and with an empty one, there are no tokens.
    for variables in [&[][..], &[("EVENODD_JWT_SECRET", ""), ("EVENODD_PUBLISH", "")]] {
        compose_with(variables, &up);
        in_time("everybody can read", async || answers(200).await).await;
    }
    fs::remove_file(&file).unwrap();
    compose(&up);
    cluster.heals().await;
    let everywhere = compose_with(&[("EVENODD_PUBLISH", "0.0.0.0")], &["config"]);
    assert!(everywhere.contains("host_ip: 0.0.0.0"), "{everywhere}");
}

async fn answers(status: u16) -> bool {
    try_get(HTTP, "/numbers").await.is_ok_and(|answer| answer.status == status)
}
