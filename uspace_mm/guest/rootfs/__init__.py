"""Root file systems for guests: Debian packages and wheels for arm64 in read-only images, without root."""
