-- Where a job of an engine ran, as JSON: its engine, host, GPUs as the node calls them, how many.
ALTER TABLE jobs ADD COLUMN place TEXT;
