"""What lines come packed in: compression, JSON arrays, tables; each is turned into a stream of lines, in bounded memory."""
