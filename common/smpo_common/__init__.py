"""What any program needs: user errors, files and URLs, retries, a run lock, discovery, command lines."""
