-- As on the way up.
LOCK TABLE agents, agent_attribute_sets IN ACCESS EXCLUSIVE MODE;
DROP VIEW agent_attributes;
CREATE TABLE agent_attributes (
    agent_id uuid NOT NULL REFERENCES agents (id),
    key varchar(255) NOT NULL,
    value varchar(255) NOT NULL,
    PRIMARY KEY (agent_id, key)
);
INSERT INTO agent_attributes (agent_id, key, value)
SELECT s.agent_id, replace(replace(split_part(p.pair, '=', 1), '%3D', '='), '%25', '%'),
       substr(p.pair, strpos(p.pair, '=') + 1)
FROM agent_attribute_sets s, unnest(s.pairs) AS p (pair);
CREATE INDEX agent_attributes_value ON agent_attributes (key, value, agent_id);
DROP TABLE agent_attribute_sets;
DELETE FROM schema_versions WHERE version = 4;
