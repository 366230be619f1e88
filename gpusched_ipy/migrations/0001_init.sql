CREATE TABLE meta (
  key   TEXT PRIMARY KEY,
  value TEXT NOT NULL
) WITHOUT ROWID;

-- Processes that use the queue. Descriptive: the lock in alive/<key> says who lives.
CREATE TABLE members (
  key         TEXT PRIMARY KEY,
  kind        TEXT NOT NULL,           -- kernel, agent, shim, terminal, script
  pid         INTEGER NOT NULL,
  start_ticks INTEGER,
  boot        TEXT NOT NULL,
  label       TEXT NOT NULL,           -- "notebook train.ipynb", for people
  version     TEXT NOT NULL,
  joined_at   REAL NOT NULL,
  busy        INTEGER NOT NULL DEFAULT 0,
  idle_mono   REAL,                    -- since when it has run nothing (this boot's clock)
  pinned      TEXT                     -- JSON list of GPU UUIDs; NULL: not pinned
);

CREATE TABLE jobs (
  id               INTEGER PRIMARY KEY AUTOINCREMENT,
  uid              TEXT NOT NULL UNIQUE,  -- made by the submitter: a retried submit is no second job
  rev              INTEGER NOT NULL,      -- rises with every change of any job: what is new since?
  kind             TEXT NOT NULL,
  name             TEXT NOT NULL,
  spec             TEXT NOT NULL,         -- JSON, as submitted
  home             TEXT,
  state            TEXT NOT NULL CHECK (state IN
                     ('pending','starting','running','completed','failed','cancelled','timeout','lost')),
  priority         INTEGER NOT NULL,
  held             INTEGER NOT NULL,
  cancel_requested INTEGER NOT NULL,
  member           TEXT,
  epoch            INTEGER NOT NULL,
  attempt          TEXT,
  attempts         INTEGER NOT NULL,
  gpus             TEXT NOT NULL,         -- JSON list of UUIDs
  boot             TEXT NOT NULL,         -- the boot that the *_mono times belong to
  submitted_at     REAL NOT NULL,
  queued_mono      REAL NOT NULL,
  started_at       REAL,
  started_mono     REAL,
  ended_at         REAL,
  run_s            REAL,
  exit_code        INTEGER,
  signal           INTEGER,
  error            TEXT,
  peak_mem_bytes   INTEGER,
  mean_utilization REAL,
  energy_j         REAL,
  crc              INTEGER NOT NULL,      -- of all columns above but rev
  -- Why it waits: rewritten often and worked out anew at any time, so outside of crc and rev.
  reason_code      TEXT,
  reason           TEXT,
  reason_since     REAL
);
CREATE INDEX jobs_by_rev ON jobs (rev);
CREATE INDEX jobs_open ON jobs (id) WHERE state IN ('pending','starting','running');
CREATE INDEX jobs_by_name ON jobs (name, id);
CREATE INDEX jobs_by_end ON jobs (ended_at);

-- Which job has which GPU. The record; the lock gpu/<UUID>.lock is the truth.
CREATE TABLE leases (
  gpu       TEXT NOT NULL,
  job_id    INTEGER NOT NULL REFERENCES jobs (id),
  epoch     INTEGER NOT NULL,
  shared    INTEGER NOT NULL,
  mem_bytes INTEGER,
  PRIMARY KEY (gpu, job_id)
) WITHOUT ROWID;

-- One row for every time a job was started.
CREATE TABLE attempts (
  attempt     TEXT PRIMARY KEY,
  job_id      INTEGER NOT NULL REFERENCES jobs (id),
  member      TEXT NOT NULL,
  gpus        TEXT NOT NULL,
  claimed_at  REAL NOT NULL,
  pid         INTEGER,
  start_ticks INTEGER,
  outcome     TEXT
) WITHOUT ROWID;
CREATE INDEX attempts_by_job ON attempts (job_id);

-- Every move of every job; replaying a job's events gives its state.
CREATE TABLE events (
  id      INTEGER PRIMARY KEY AUTOINCREMENT,
  at      REAL NOT NULL,
  job_id  INTEGER,
  attempt TEXT,
  what    TEXT NOT NULL,
  data    TEXT
);
CREATE INDEX events_by_job ON events (job_id, id);
