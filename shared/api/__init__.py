"""What HTTP and the ranks both speak: requests, codecs, media, jobs. No torch."""
