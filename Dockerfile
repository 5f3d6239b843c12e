# One image with every binary. The caches need BuildKit, which is the default since Docker 23.
FROM rust:1.95-slim-bookworm AS build
WORKDIR /build
# Link-time optimisation: the build takes longer, but the binaries run for years.
ENV CARGO_PROFILE_RELEASE_LTO=thin
COPY . .
# The caches keep downloaded and compiled crates between builds: after a change only our own crates
# are built again. The caches are not part of the image, so the binaries are copied out of them.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/build/target,sharing=locked \
    # Cargo compares file times, and another checkout with the same cache may have newer files.
    find services nats -type f -exec touch {} + \
    && cargo build --locked --release --workspace --bins \
    && mkdir /binaries /empty \
    && cd target/release && cp generator multiplier gateway evenodd /binaries/

# This base has no shell and no package manager, and does not run as root.
FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /binaries/ /usr/local/bin/
# A new volume takes its owner from the directory of the image at its mount point. The service
# `keys` therefore owns the volume of the keys, and the brokers own their stores, without running as
# root.
COPY --from=build --chown=10000:10000 /empty/ /keys/
COPY --from=build --chown=10010:10010 /empty/ /stores/nats-1/
COPY --from=build --chown=10010:10010 /empty/ /stores/nats-2/
COPY --from=build --chown=10010:10010 /empty/ /stores/nats-3/
