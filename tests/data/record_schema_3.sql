BEGIN TRANSACTION;
CREATE TABLE attempts (
  attempt     TEXT PRIMARY KEY,
  job_id      INTEGER NOT NULL REFERENCES jobs (id),
  member      TEXT NOT NULL,
  gpus        TEXT NOT NULL,
  claimed_at  REAL NOT NULL,
  pid         INTEGER,
  start_ticks INTEGER,
  outcome     TEXT
, card_bytes INTEGER, boot TEXT) WITHOUT ROWID;
INSERT INTO "attempts" VALUES('1e305fb241b349df4975007d0e492b7a',3,'m1','["GPU-0"]',1790000029.0,4242,777,NULL,NULL,NULL);
INSERT INTO "attempts" VALUES('2cb78ca3a017c31191eaad9d94a08fc1',6,'m1','["GPU-0", "GPU-1"]',1790000057.0,4242,777,NULL,NULL,NULL);
INSERT INTO "attempts" VALUES('3bf30557159a82a5843be9e50d80609c',7,'m1','["GPU-0"]',1790000065.0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "attempts" VALUES('41d4a6f6821dc08eb2e34ef36db16ad2',4,'m1','["GPU-0"]',1790000040.0,4242,777,NULL,NULL,NULL);
INSERT INTO "attempts" VALUES('62ddd9d828a69a08098794b75f636a8b',2,'m1','["GPU-0"]',1790000018.0,4242,777,NULL,NULL,NULL);
INSERT INTO "attempts" VALUES('c1cc8518beeedc1e75e9295335d7083b',1,'m1','["GPU-0"]',1790000005.0,4242,777,NULL,NULL,NULL);
CREATE TABLE events (
  id      INTEGER PRIMARY KEY AUTOINCREMENT,
  at      REAL NOT NULL,
  job_id  INTEGER,
  attempt TEXT,
  what    TEXT NOT NULL,
  data    TEXT
);
INSERT INTO "events" VALUES(1,1790000003.0,1,NULL,'submitted','{"held": false, "priority": 0}');
INSERT INTO "events" VALUES(2,1790000004.0,1,'c1cc8518beeedc1e75e9295335d7083b','claimed','{"gpus": ["GPU-0"], "state": "starting"}');
INSERT INTO "events" VALUES(3,1790000008.0,1,'c1cc8518beeedc1e75e9295335d7083b','started','{"member": "shim", "state": "running"}');
INSERT INTO "events" VALUES(4,1790000011.0,1,'c1cc8518beeedc1e75e9295335d7083b','ended','{"exit_code": 0, "signal": null, "error": null, "state": "completed"}');
INSERT INTO "events" VALUES(5,1790000013.0,1,'c1cc8518beeedc1e75e9295335d7083b','usage','{}');
INSERT INTO "events" VALUES(6,1790000016.0,2,NULL,'submitted','{"held": false, "priority": 0}');
INSERT INTO "events" VALUES(7,1790000017.0,2,'62ddd9d828a69a08098794b75f636a8b','claimed','{"gpus": ["GPU-0"], "state": "starting"}');
INSERT INTO "events" VALUES(8,1790000021.0,2,'62ddd9d828a69a08098794b75f636a8b','started','{"member": "shim", "state": "running"}');
INSERT INTO "events" VALUES(9,1790000024.0,2,'62ddd9d828a69a08098794b75f636a8b','ended','{"exit_code": 3, "signal": null, "error": "na\u00efve \u2603", "state": "failed"}');
INSERT INTO "events" VALUES(10,1790000027.0,3,NULL,'submitted','{"held": false, "priority": 0}');
INSERT INTO "events" VALUES(11,1790000028.0,3,'1e305fb241b349df4975007d0e492b7a','claimed','{"gpus": ["GPU-0"], "state": "starting"}');
INSERT INTO "events" VALUES(12,1790000032.0,3,'1e305fb241b349df4975007d0e492b7a','started','{"member": "shim", "state": "running"}');
INSERT INTO "events" VALUES(13,1790000035.0,3,'1e305fb241b349df4975007d0e492b7a','ended','{"exit_code": null, "signal": 15, "error": null, "state": "timeout"}');
INSERT INTO "events" VALUES(14,1790000038.0,4,NULL,'submitted','{"held": false, "priority": 0}');
INSERT INTO "events" VALUES(15,1790000039.0,4,'41d4a6f6821dc08eb2e34ef36db16ad2','claimed','{"gpus": ["GPU-0"], "state": "starting"}');
INSERT INTO "events" VALUES(16,1790000043.0,4,'41d4a6f6821dc08eb2e34ef36db16ad2','started','{"member": "shim", "state": "running"}');
INSERT INTO "events" VALUES(17,1790000046.0,4,'41d4a6f6821dc08eb2e34ef36db16ad2','ended','{"exit_code": null, "signal": null, "error": "outcome unknown", "state": "lost"}');
INSERT INTO "events" VALUES(18,1790000049.0,5,NULL,'submitted','{"held": false, "priority": 0}');
INSERT INTO "events" VALUES(19,1790000052.0,5,NULL,'ended','{"exit_code": null, "signal": null, "error": null, "state": "cancelled"}');
INSERT INTO "events" VALUES(20,1790000055.0,6,NULL,'submitted','{"held": false, "priority": 0}');
INSERT INTO "events" VALUES(21,1790000056.0,6,'2cb78ca3a017c31191eaad9d94a08fc1','claimed','{"gpus": ["GPU-0", "GPU-1"], "state": "starting"}');
INSERT INTO "events" VALUES(22,1790000060.0,6,'2cb78ca3a017c31191eaad9d94a08fc1','started','{"member": "shim", "state": "running"}');
INSERT INTO "events" VALUES(23,1790000063.0,7,NULL,'submitted','{"held": false, "priority": 0}');
INSERT INTO "events" VALUES(24,1790000064.0,7,'3bf30557159a82a5843be9e50d80609c','claimed','{"gpus": ["GPU-0"], "state": "starting"}');
INSERT INTO "events" VALUES(25,1790000068.0,8,NULL,'submitted','{"held": false, "priority": 7}');
INSERT INTO "events" VALUES(26,1790000072.0,9,NULL,'submitted','{"held": true, "priority": 0}');
INSERT INTO "events" VALUES(27,1790000075.0,10,NULL,'submitted','{"held": false, "priority": 0}');
INSERT INTO "events" VALUES(28,1790000077.0,NULL,NULL,'drained','{"why": "drained by its user"}');
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
, retried     INTEGER NOT NULL DEFAULT 0, requeued    INTEGER NOT NULL DEFAULT 0, oom         INTEGER NOT NULL DEFAULT 0, oom_retried INTEGER NOT NULL DEFAULT 0, not_before  REAL, array_id    TEXT, job_key     TEXT, hold_reason TEXT);
INSERT INTO "jobs" VALUES(1,'done',5,'command','done','{"uid":"done","kind":"command","name":"done","priority":0,"request":{"gpus":1,"mem_bytes":null,"on_gpu":null,"after":[],"after_any":[],"begin_at":null,"time_s":null,"retries":0,"requeue":false,"retry_oom":false,"max_running":null},"held":false,"argv":["true"],"shell":false,"code":null,"cwd":"/","env":{"PATH":"/bin"},"labels":{"a":"b"},"array":null,"sweep":{},"key":null,"engine":"local","owner":"terminal pts/1","home":null,"cell_id":null,"in_place":false}',NULL,'completed',0,0,0,'shim',1,'c1cc8518beeedc1e75e9295335d7083b',1,'["GPU-0"]','boot-a',1790000001.0,1001.0,1790000007.0,1007.0,1790000010.0,3.0,0,NULL,NULL,1073741824,0.5,12.5,3527590260,NULL,NULL,NULL,0,0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(2,'failed',9,'command','failed','{"uid":"failed","kind":"command","name":"failed","priority":0,"request":{"gpus":1,"mem_bytes":null,"on_gpu":null,"after":[],"after_any":[],"begin_at":null,"time_s":null,"retries":0,"requeue":false,"retry_oom":false,"max_running":null},"held":false,"argv":["true"],"shell":false,"code":null,"cwd":"/","env":{"PATH":"/bin"},"labels":{"a":"b"},"array":null,"sweep":{},"key":null,"engine":"local","owner":"terminal pts/1","home":null,"cell_id":null,"in_place":false}',NULL,'failed',0,0,0,'shim',1,'62ddd9d828a69a08098794b75f636a8b',1,'["GPU-0"]','boot-a',1790000014.0,1014.0,1790000020.0,1020.0,1790000023.0,3.0,3,NULL,'naïve ☃',NULL,NULL,NULL,3751169284,NULL,NULL,NULL,0,0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(3,'timeout',13,'command','timeout','{"uid":"timeout","kind":"command","name":"timeout","priority":0,"request":{"gpus":1,"mem_bytes":null,"on_gpu":null,"after":[],"after_any":[],"begin_at":null,"time_s":null,"retries":0,"requeue":false,"retry_oom":false,"max_running":null},"held":false,"argv":["true"],"shell":false,"code":null,"cwd":"/","env":{"PATH":"/bin"},"labels":{"a":"b"},"array":null,"sweep":{},"key":null,"engine":"local","owner":"terminal pts/1","home":null,"cell_id":null,"in_place":false}',NULL,'timeout',0,0,0,'shim',1,'1e305fb241b349df4975007d0e492b7a',1,'["GPU-0"]','boot-a',1790000025.0,1025.0,1790000031.0,1031.0,1790000034.0,3.0,NULL,15,NULL,NULL,NULL,NULL,2857376428,NULL,NULL,NULL,0,0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(4,'lost',17,'command','lost','{"uid":"lost","kind":"command","name":"lost","priority":0,"request":{"gpus":1,"mem_bytes":null,"on_gpu":null,"after":[],"after_any":[],"begin_at":null,"time_s":null,"retries":0,"requeue":false,"retry_oom":false,"max_running":null},"held":false,"argv":["true"],"shell":false,"code":null,"cwd":"/","env":{"PATH":"/bin"},"labels":{"a":"b"},"array":null,"sweep":{},"key":null,"engine":"local","owner":"terminal pts/1","home":null,"cell_id":null,"in_place":false}',NULL,'lost',0,0,0,'shim',1,'41d4a6f6821dc08eb2e34ef36db16ad2',1,'["GPU-0"]','boot-a',1790000036.0,1036.0,1790000042.0,1042.0,1790000045.0,3.0,NULL,NULL,'outcome unknown',NULL,NULL,NULL,305232993,NULL,NULL,NULL,0,0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(5,'cancelled',19,'command','cancelled','{"uid":"cancelled","kind":"command","name":"cancelled","priority":0,"request":{"gpus":1,"mem_bytes":null,"on_gpu":null,"after":[],"after_any":[],"begin_at":null,"time_s":null,"retries":0,"requeue":false,"retry_oom":false,"max_running":null},"held":false,"argv":["true"],"shell":false,"code":null,"cwd":"/","env":{"PATH":"/bin"},"labels":{},"array":null,"sweep":{},"key":null,"engine":"local","owner":"terminal pts/1","home":null,"cell_id":null,"in_place":false}',NULL,'cancelled',0,0,1,NULL,0,NULL,0,'[]','boot-a',1790000047.0,1047.0,NULL,NULL,1790000051.0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,111722563,NULL,NULL,NULL,0,0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(6,'running',22,'command','running','{"uid":"running","kind":"command","name":"running","priority":0,"request":{"gpus":2,"mem_bytes":null,"on_gpu":null,"after":[],"after_any":[],"begin_at":null,"time_s":null,"retries":0,"requeue":true,"retry_oom":false,"max_running":null},"held":false,"argv":["true"],"shell":false,"code":null,"cwd":"/","env":{"PATH":"/bin"},"labels":{},"array":null,"sweep":{},"key":null,"engine":"local","owner":"terminal pts/1","home":null,"cell_id":null,"in_place":false}',NULL,'running',0,0,0,'shim',1,'2cb78ca3a017c31191eaad9d94a08fc1',1,'["GPU-0", "GPU-1"]','boot-a',1790000053.0,1053.0,1790000059.0,1059.0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,1615772071,NULL,NULL,NULL,0,0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(7,'starting',24,'command','starting','{"uid":"starting","kind":"command","name":"starting","priority":0,"request":{"gpus":1,"mem_bytes":null,"on_gpu":null,"after":[],"after_any":[],"begin_at":null,"time_s":null,"retries":0,"requeue":false,"retry_oom":false,"max_running":null},"held":false,"argv":["true"],"shell":false,"code":null,"cwd":"/","env":{"PATH":"/bin"},"labels":{},"array":null,"sweep":{},"key":null,"engine":"local","owner":"terminal pts/1","home":null,"cell_id":null,"in_place":false}',NULL,'starting',0,0,0,'m1',1,'3bf30557159a82a5843be9e50d80609c',1,'["GPU-0"]','boot-a',1790000061.0,1061.0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,227549101,NULL,NULL,NULL,0,0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(8,'pending',25,'command','pending','{"uid":"pending","kind":"command","name":"pending","priority":7,"request":{"gpus":1,"mem_bytes":null,"on_gpu":null,"after":[1],"after_any":[2],"begin_at":2000000000.0,"time_s":null,"retries":0,"requeue":false,"retry_oom":false,"max_running":null},"held":false,"argv":["true"],"shell":false,"code":null,"cwd":"/","env":{"PATH":"/bin"},"labels":{},"array":null,"sweep":{},"key":null,"engine":"local","owner":"terminal pts/1","home":null,"cell_id":null,"in_place":false}',NULL,'pending',7,0,0,NULL,0,NULL,0,'[]','boot-a',1790000066.0,1066.0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,390581385,'dependency','after 1',1790000069.0,0,0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(9,'held',26,'command','held','{"uid":"held","kind":"command","name":"held","priority":0,"request":{"gpus":1,"mem_bytes":null,"on_gpu":null,"after":[],"after_any":[],"begin_at":null,"time_s":null,"retries":0,"requeue":false,"retry_oom":false,"max_running":null},"held":true,"argv":["true"],"shell":false,"code":null,"cwd":"/","env":{"PATH":"/bin"},"labels":{},"array":{"id":"abc","index":1,"size":3},"sweep":{},"key":null,"engine":"local","owner":"terminal pts/1","home":null,"cell_id":null,"in_place":false}',NULL,'pending',0,1,0,NULL,0,NULL,0,'[]','boot-a',1790000070.0,1070.0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,496336803,NULL,NULL,NULL,0,0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(10,'cell',27,'cell','cell','{"uid":"cell","kind":"cell","name":"cell","priority":0,"request":{"gpus":1,"mem_bytes":null,"on_gpu":null,"after":[],"after_any":[],"begin_at":null,"time_s":null,"retries":0,"requeue":false,"retry_oom":false,"max_running":null},"held":false,"argv":null,"shell":false,"code":"print(1)","cwd":"/","env":{},"labels":{},"array":null,"sweep":{},"key":null,"engine":"local","owner":"terminal pts/1","home":"m2","cell_id":null,"in_place":false}','m2','pending',0,0,0,NULL,0,NULL,0,'[]','boot-a',1790000073.0,1073.0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,954184288,NULL,NULL,NULL,0,0,0,0,NULL,NULL,NULL,NULL);
CREATE TABLE leases (
  gpu       TEXT NOT NULL,
  job_id    INTEGER NOT NULL REFERENCES jobs (id),
  epoch     INTEGER NOT NULL,
  shared    INTEGER NOT NULL,
  mem_bytes INTEGER,
  PRIMARY KEY (gpu, job_id)
) WITHOUT ROWID;
INSERT INTO "leases" VALUES('GPU-0',6,1,0,NULL);
INSERT INTO "leases" VALUES('GPU-0',7,1,0,NULL);
INSERT INTO "leases" VALUES('GPU-1',6,1,0,NULL);
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
, asked REAL);
INSERT INTO "members" VALUES('m2','kernel',31604,1615856,'boot-a','notebook a.ipynb','0.1.0',1790000076.0,0,NULL,NULL,NULL);
CREATE TABLE meta (
  key   TEXT PRIMARY KEY,
  value TEXT NOT NULL
) WITHOUT ROWID;
INSERT INTO "meta" VALUES('drained','drained by its user');
CREATE INDEX jobs_by_rev ON jobs (rev);
CREATE INDEX jobs_open ON jobs (id) WHERE state IN ('pending','starting','running');
CREATE INDEX jobs_by_name ON jobs (name, id);
CREATE INDEX jobs_by_end ON jobs (ended_at);
CREATE INDEX attempts_by_job ON attempts (job_id);
CREATE INDEX events_by_job ON events (job_id, id);
CREATE INDEX jobs_line ON jobs (state, held, priority, submitted_at)
  WHERE state IN ('pending','starting','running');
CREATE INDEX jobs_by_array ON jobs (array_id, id) WHERE array_id IS NOT NULL;
CREATE UNIQUE INDEX jobs_by_key ON jobs (job_key)
  WHERE job_key IS NOT NULL AND state IN ('pending','starting','running','completed');
CREATE INDEX jobs_past ON jobs (name, ended_at) WHERE run_s IS NOT NULL;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('jobs',10);
INSERT INTO "sqlite_sequence" VALUES('events',28);
COMMIT;
PRAGMA user_version = 3;
